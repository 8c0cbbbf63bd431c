"""What later edit batches did to earlier ones: the forgetting matrix, the average score, backward transfer and forward
effect, which are read off it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ForgettingMatrix:
    """`R[t, i]`: the mean score of batch `batches[i]` in the audit after batch `after[t]`.

    `scores` (T, I) is NaN where nothing was asked, as it is for i later than t; `counts` (T, I) says how many
    probes a mean stands on.
    """

    after: tuple[int, ...]
    batches: tuple[int, ...]
    scores: FloatArray
    counts: npt.NDArray[np.int64]

    def rows(self) -> list[list[float | None]]:
        """The scores as lists, None where there is none."""
        return [[None if np.isnan(value) else float(value) for value in row] for row in self.scores]


def forgetting_matrix(scored: Iterable[tuple[int, int, float]]) -> ForgettingMatrix:
    """Means of scored probes, each (batch after which it was asked, batch it came with, score)."""
    found = list(scored)
    after = tuple(sorted({t for t, _, _ in found}))
    batches = tuple(sorted({i for _, i, _ in found}))
    row, column = ({batch: place for place, batch in enumerate(some)} for some in (after, batches))
    sums = np.zeros((len(after), len(batches)))
    counts = np.zeros(sums.shape, np.int64)
    where = ([row[t] for t, _, _ in found], [column[i] for _, i, _ in found])
    np.add.at(sums, where, [score for _, _, score in found])
    np.add.at(counts, where, 1)
    scores = np.full(sums.shape, np.nan)
    np.divide(sums, counts, out=scores, where=counts > 0)
    return ForgettingMatrix(after, batches, scores, counts)


def first_rows(matrix: ForgettingMatrix) -> npt.NDArray[np.int64]:
    """For each batch the row (I,) in which it was asked first: its own where an audit follows every batch."""
    return np.asarray(np.argmax(~np.isnan(matrix.scores), axis=0), np.int64)


def average_score(matrix: ForgettingMatrix) -> float:
    """The mean over batches of the last row; NaN where nothing was asked."""
    last = matrix.scores[-1:]
    return float(np.nanmean(last)) if (~np.isnan(last)).any() else float("nan")


def backward_transfer(matrix: ForgettingMatrix) -> float:
    """BWT: the mean over i < t of `R[t, i] - R[i, i]` at the last t; negative means forgetting.

    Where no audit followed batch i itself, its first score stands for `R[i, i]`. NaN when no batch was asked twice.
    """
    if not matrix.after:
        return float("nan")
    first = first_rows(matrix)
    changes = matrix.scores[-1] - matrix.scores[first, np.arange(len(first))]
    counted = (first < len(matrix.after) - 1) & ~np.isnan(changes)
    return float(changes[counted].mean()) if counted.any() else float("nan")


def forward_effect(matrix: ForgettingMatrix) -> float:
    """What a grown bank does to batches that go in: the mean first score of later batches minus that of the first.

    With an audit after every batch: the mean over i > 0 of `R[i, i]`, minus `R[0, 0]`. NaN when all were asked first
    in one audit.
    """
    if not matrix.after:
        return float("nan")
    first = first_rows(matrix)
    scores = matrix.scores[first, np.arange(len(first))]
    is_early = first == first.min()
    if is_early.all():
        return float("nan")
    return float(scores[~is_early].mean() - scores[is_early].mean())
