"""The analytic start of the `tokens` hypernetwork: statistics of the frozen LLM, no gradient step.

Why: hidden states are anisotropic, so that raw inner products with them fire on everything; white ones tell states
apart. And a value that starts along a word's own direction is read by the blocks above from the first step, where a
learned one that starts near zero stays too small beside a residual stream of norm 150 to matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from knowstore.experts.llm import FrozenLLM, pad_ids
from knowstore.experts.tokens import TokensHypernetwork

_RIDGE = 0.01  # of the mean variance: directions that hardly vary are not blown up
_WORD_RIDGE = 0.05


@torch.no_grad()
def analytic_start(
    hypernetwork: TokensHypernetwork, llm: FrozenLLM, prompts: Sequence[Sequence[int]], *, batch_size: int = 64
) -> None:
    """Fill the hypernetwork's statistics in place.

    Args:
        prompts: token ids of questions with their answers; a thousand or more.
    """
    found = []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        x = llm.states(pad_ids(part), hypernetwork.config.layer).float().cpu()
        found += [x[row, 1 : len(ids)] for row, ids in enumerate(part)]  # the first token's state is like no other
    X = torch.cat(found)  # (N, D)
    eye = torch.eye(X.shape[1])
    mean, second = X.mean(0), X.T @ X / len(X)
    hypernetwork.x_mean.copy_(mean)
    ridge = second + 1e-4 * second.diagonal().mean() * eye
    hypernetwork.const.copy_(torch.linalg.solve(ridge, mean))
    hypernetwork.whitener.copy_(_whitener(X - mean))
    table = llm.embeddings.float().cpu()
    centred = table - table.mean(0)
    spread = centred.T @ centred / len(centred)
    hypernetwork.word_mean.copy_(table.mean(0))
    inverse = torch.linalg.inv(spread + _WORD_RIDGE * spread.diagonal().mean() * eye)
    hypernetwork.word_map.copy_(inverse / inverse.abs().max())  # words are normalised, so the scale is free


def _whitener(centred: Tensor) -> Tensor:
    """The symmetric (D, D) that gives states unit variances without correlation."""
    covariance = centred.T @ centred / len(centred)
    values, directions = torch.linalg.eigh(
        covariance + _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    )
    whitener: Tensor = directions @ torch.diag(values**-0.5) @ directions.T
    return whitener
