"""Measures of answers: exact match, token F1, and how sure one can be of their means."""

from knowstore.evaluation.metrics import bootstrap_interval, exact_match, median_ratio, normalise, token_f1

__all__ = ["bootstrap_interval", "exact_match", "median_ratio", "normalise", "token_f1"]
