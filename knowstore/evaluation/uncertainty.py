"""How sure one can be of a mean, and of a difference on the same questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

_AT_ONCE = 1_000_000  # drawn scores in memory
_Z = 1.959964  # of the normal distribution, for 95 %


def bootstrap_interval(scores: Sequence[float], *, seed: int = 0, n_samples: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of N scores, by resampling them `n_samples` times.

    Raises:
        ValueError: no scores.
    """
    if len(scores) == 0:
        raise ValueError("an interval needs at least one score")
    return _middle(_resampled_means(scores, np.random.default_rng(seed), n_samples))


def grouped_interval(groups: Sequence[Sequence[float]], *, seed: int = 0, n_samples: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of G groups' means; empty ones are left out.

    Each group is resampled by itself, and its draws are spread by sqrt(n / (n - 1)), for those of n scores vary less
    than n new scores would (Rao and Wu 1988). Groups of one score are resampled together, as strata that were
    collapsed: alone they would seem not to vary at all.

    Raises:
        ValueError: no scores.
    """
    alone = [group[0] for group in groups if len(group) == 1]
    kept = [(group, 1) for group in groups if len(group) > 1]
    kept += [(alone, len(alone))] if alone else []
    if not kept:
        raise ValueError("an interval needs at least one score")
    generator = np.random.default_rng(seed)
    n_groups = sum(weight for _, weight in kept)
    means = sum(
        weight * _spread(_resampled_means(group, generator, n_samples), group) for group, weight in kept
    ) / n_groups  # fmt: skip
    low, high = _middle(np.asarray(means))
    least, most = (sum(weight * limit(group) for group, weight in kept) / n_groups for limit in (min, max))
    return max(low, float(least)), min(high, float(most))


def _spread(means: npt.NDArray[np.float64], scores: Sequence[float]) -> npt.NDArray[np.float64]:
    n, middle = len(scores), float(np.mean(scores))
    return middle + (means - middle) * np.sqrt(n / (n - 1)) if n > 1 else means


def proportion_interval(n_hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion, which none or all of few cases do not shrink to a point.

    Raises:
        ValueError: no cases.
    """
    if n == 0:
        raise ValueError("an interval needs at least one case")
    share, z2 = n_hits / n, _Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = _Z / (1 + z2 / n) * float(np.sqrt(share * (1 - share) / n + z2 / (4 * n**2)))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def paired_p_value(differences: Sequence[float], *, seed: int = 0, n_samples: int = 10_000) -> float:
    """The two-sided p-value of N paired differences under random signs (Fisher's randomisation test).

    All 2^N signs are tried up to N = 13 differences that are not zero, else `n_samples` random ones, the observed
    one among them. 1.0 when there is no difference at all.
    """
    values = np.asarray([value for value in differences if value], np.float64)
    if values.size == 0:
        return 1.0
    if values.size <= 13:
        signs = 1 - 2 * ((np.arange(2**values.size)[:, None] >> np.arange(values.size)) & 1)
        return float(np.mean(_is_extreme(signs @ values, values)))
    generator = np.random.default_rng(seed)
    n_extreme = sum(
        int(_is_extreme((1 - 2 * generator.integers(0, 2, (n, values.size))) @ values, values).sum())
        for n in _parts(n_samples, values.size)
    )
    return (n_extreme + 1) / (n_samples + 1)


def _is_extreme(sums: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    return np.asarray(np.abs(sums) >= abs(values.sum()) - 1e-9)


def _resampled_means(
    scores: Sequence[float], generator: np.random.Generator, n_samples: int
) -> npt.NDArray[np.float64]:
    values = np.asarray(scores, np.float64)
    parts = (generator.integers(0, values.size, (n, values.size)) for n in _parts(n_samples, values.size))
    return np.concatenate([values[draws].mean(axis=1) for draws in parts])


def _middle(means: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _parts(n_samples: int, n_values: int) -> Iterator[int]:
    """`n_samples` in pieces that fit in memory."""
    size = max(1, _AT_ONCE // n_values)
    for done in range(0, n_samples, size):
        yield min(size, n_samples - done)
