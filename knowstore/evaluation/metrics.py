"""Exact match and token F1 with SQuAD's normalisation (Rajpurkar et al., 2016), from 0.0 to 1.0."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, blanks folded."""
    kept = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the prediction equals one of the accepted answers after normalisation, else 0.0."""
    return float(any(normalise(prediction) == normalise(answer) for answer in answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best harmonic mean of precision and recall of words over the accepted answers."""
    return max((_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers), default=0.0)


def _f1(predicted: list[str], accepted: list[str]) -> float:
    if not predicted or not accepted:
        return float(predicted == accepted)
    n_common = sum((Counter(predicted) & Counter(accepted)).values())
    if n_common == 0:
        return 0.0
    precision, recall = n_common / len(predicted), n_common / len(accepted)
    return 2 * precision * recall / (precision + recall)


def bootstrap_interval(scores: Sequence[float], *, seed: int = 0, n_samples: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of N scores, by resampling them `n_samples` times.

    Raises:
        ValueError: no scores.
    """
    values = np.asarray(scores, np.float64)
    if values.size == 0:
        raise ValueError("an interval needs at least one score")
    draws = np.random.default_rng(seed).integers(0, values.size, (n_samples, values.size))
    low, high = np.quantile(values[draws].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)
