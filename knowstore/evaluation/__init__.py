"""Measures of answers: exact match, token F1, and how sure one can be of their means; ratios of times."""

from knowstore.evaluation.metrics import bootstrap_interval, exact_match, normalise, token_f1
from knowstore.evaluation.ratios import median_ratio

__all__ = ["bootstrap_interval", "exact_match", "median_ratio", "normalise", "token_f1"]
