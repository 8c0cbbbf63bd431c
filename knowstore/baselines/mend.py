"""MEND (Mitchell et al., 2022): the edit of a matrix is the sum of its tokens' rank-one edits."""

from __future__ import annotations

from torch import Tensor

from knowstore.baselines.gradients import GradientFactors


def summed(_found: GradientFactors, edited: GradientFactors, rate: Tensor, _damping: Tensor) -> Tensor:
    """- rate / T * sum over the T tokens of delta~_t u~_t^T, (D, d).

    By 1 / T the size of an edit does not grow with its length.
    """
    return -rate / len(edited.u) * edited.delta.T @ edited.u
