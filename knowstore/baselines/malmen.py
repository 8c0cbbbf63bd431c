"""MALMEN (Tan et al., 2024): the edit of a matrix is the one that serves all tokens best, by the normal equation.

Each token alone would want the change S_t = - rate * delta~_t u~_t^T, which at its own key u_t adds
d_t = S_t u_t. The change S (D, d) that comes closest to all of these at once minimises

    |S U - D|^2 + damping |S|^2        U (d, T) of the u_t, D (D, T) of the d_t

    S = D U^T (U U^T + damping I)^-1 = D (U^T U + damping I)^-1 U^T
"""

from __future__ import annotations

import torch
from torch import Tensor

from knowstore.baselines.gradients import GradientFactors


def normal_equation(U: Tensor, D: Tensor, damping: Tensor) -> Tensor:
    """S (D, d), by whichever of the two forms has the smaller system.

    Args:
        U: keys (d, T).
        D: what is to be added at them (D, T).
        damping: above 0.
    """
    d, n_tokens = U.shape
    if n_tokens < d:
        inner = U.T @ U + damping * torch.eye(n_tokens, dtype=U.dtype, device=U.device)
        solved: Tensor = torch.linalg.solve(inner, U.T)  # (T, d)
        return D @ solved
    outer = U @ U.T + damping * torch.eye(d, dtype=U.dtype, device=U.device)  # symmetric
    transposed: Tensor = torch.linalg.solve(outer, U @ D.T)  # (d, D)
    return transposed.T


def least_squares(found: GradientFactors, edited: GradientFactors, rate: Tensor, damping: Tensor) -> Tensor:
    """The change (D, d) that serves all tokens best."""
    alone = -rate * edited.delta * (edited.u * found.u).sum(-1, keepdim=True)  # (T, D), the d_t
    return normal_equation(found.u.T, alone.T, damping)
