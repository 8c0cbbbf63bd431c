"""Measures of answers: exact match, token F1, forgetting, and how sure one can be of their means; ratios of times."""

from knowstore.evaluation.forgetting import (
    ForgettingMatrix,
    average_score,
    backward_transfer,
    first_rows,
    forgetting_matrix,
    forward_effect,
)
from knowstore.evaluation.metrics import exact_match, holds_answer, normalise, token_f1
from knowstore.evaluation.ratios import median_ratio
from knowstore.evaluation.uncertainty import bootstrap_interval, grouped_interval, paired_p_value, proportion_interval

__all__ = [
    "ForgettingMatrix",
    "average_score",
    "backward_transfer",
    "bootstrap_interval",
    "exact_match",
    "first_rows",
    "forgetting_matrix",
    "forward_effect",
    "grouped_interval",
    "holds_answer",
    "median_ratio",
    "normalise",
    "paired_p_value",
    "proportion_interval",
    "token_f1",
]
