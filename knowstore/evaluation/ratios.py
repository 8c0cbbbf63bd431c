"""How many times as long one thing takes as another, when both were measured in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def median_ratio(
    above: Sequence[float], below: Sequence[float], *, seed: int = 0, n_samples: int = 2000
) -> tuple[float, float, float]:
    """The ratio of two medians over N rounds that measured both, and its bootstrap 95 % interval: (ratio, low, high).

    Rounds are resampled whole, so that what slowed both down at a time cancels.

    Raises:
        ValueError: no rounds, or not as many of the one as of the other.
    """
    pairs = np.asarray([above, below], np.float64) if len(above) == len(below) else np.empty((2, 0))
    if pairs.shape[1] == 0:
        raise ValueError(f"a ratio needs rounds that measured both, not {len(above)} and {len(below)} figures")
    n = pairs.shape[1]
    draws = np.random.default_rng(seed).integers(0, n, (n_samples, n))
    drawn = np.median(pairs[:, draws], axis=2)
    low, high = np.quantile(drawn[0] / drawn[1], (0.025, 0.975))
    return float(np.median(pairs[0]) / np.median(pairs[1])), float(low), float(high)
