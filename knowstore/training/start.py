"""The analytic starts of hypernetworks: statistics of the frozen LLM, no gradient step.

Why: hidden states are anisotropic, so that raw inner products with them fire on everything; white ones tell states
apart. And a value that starts along a word's own direction is read by the blocks above from the first step, where a
learned one that starts near zero stays too small beside a residual stream of norm 150 to matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from knowstore.experts.llm import FrozenLLM, pad_ids
from knowstore.experts.pooled import PooledHypernetwork
from knowstore.experts.tokens import TokensHypernetwork

_RIDGE = 0.01  # of the mean variance: directions that hardly vary are not blown up
_WORD_RIDGE = 0.05
_POOLED_NORM = 30.0  # of what an expert adds at first


@torch.no_grad()
def analytic_start(
    hypernetwork: TokensHypernetwork, llm: FrozenLLM, prompts: Sequence[Sequence[int]], *, batch_size: int = 64
) -> None:
    """Fill the statistics of a `tokens` hypernetwork in place.

    Args:
        prompts: token ids of questions with their answers; a thousand or more.
    """
    X = _states(llm, prompts, hypernetwork.config.layer, batch_size)
    mean = X.mean(0)
    hypernetwork.x_mean.copy_(mean)
    hypernetwork.const.copy_(_constant(X))
    hypernetwork.whitener.copy_(_whitener(X - mean))
    hypernetwork.word_mean.copy_(llm.embeddings.float().cpu().mean(0))
    hypernetwork.word_map.copy_(_word_map(llm))


@torch.no_grad()
def pooled_start(
    hypernetwork: PooledHypernetwork,
    llm: FrozenLLM,
    prompts: Sequence[Sequence[int]],
    means: Tensor,
    *,
    batch_size: int = 64,
) -> None:
    """Let each expert of a `pooled` hypernetwork, which stays the paper's Eq. 4, begin by adding its passage's words.

    One of its ranks adds the same vector at every position: what tells the passage's mean word embedding from those of
    other passages, along the words' own directions, as far as half the bottleneck has directions for it. The other
    ranks begin as in the paper, but add nothing yet.

    Args:
        prompts: token ids of questions with their answers; a thousand or more.
        means: the mean word embeddings (N, D) of N passages.
    """
    D, R = hypernetwork.config.width, hypernetwork.config.rank
    word_map, means = _word_map(llm), means.float().cpu()
    wanted = (means - means.mean(0)) @ word_map  # (N, D)
    n = min(hypernetwork.config.bottleneck // 2, D)
    directions = torch.linalg.eigh(wanted.T @ wanted / len(wanted)).eigenvectors[:, -n:]  # (D, n) that vary most
    project = (word_map @ directions).T  # a half is the other's negative, as ReLU lets but one of the two through
    hypernetwork.inner.weight[: 2 * n].copy_(torch.cat([project, -project]))
    offset = project @ means.mean(0)
    hypernetwork.inner.bias[: 2 * n].copy_(torch.cat([-offset, offset]))
    scale = _POOLED_NORM / (wanted @ directions).norm(dim=-1).mean().clamp(min=1e-6)
    weights, biases = hypernetwork.outer.weight.chunk(4), hypernetwork.outer.bias.chunk(4)
    shapes = (D, R), (R, D), (D, R), (R, D)
    up1, up2, dw1, dw2 = (part.view(*shape, -1) for part, shape in zip(weights, shapes, strict=True))
    for part in (up1[:, 0], up2[0], up2[:, 0], dw1[0], dw1[:, 0], dw2):
        part.zero_()
    dw2[0, :, : 2 * n] = scale * torch.cat([directions, -directions], 1)
    up1, up2, dw1, dw2 = (part.view(*shape) for part, shape in zip(biases, shapes, strict=True))
    for part in (up2[0], up2[:, 0], dw1[0], dw1[:, 0], dw2):
        part.zero_()
    up1[:, 0] = _constant(_states(llm, prompts, hypernetwork.config.layer, batch_size))
    up2[0, 0] = dw1[0, 0] = 1.0  # the first hidden state alone belongs to the first rank


def _states(llm: FrozenLLM, prompts: Sequence[Sequence[int]], layer: int, batch_size: int) -> Tensor:
    """What the FFN of the mount layer is given: (N, D), without the first token's, which is like no other."""
    found = []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        x = llm.states(pad_ids(part), layer).float().cpu()
        found += [x[row, 1 : len(ids)] for row, ids in enumerate(part)]
    return torch.cat(found)


def _constant(X: Tensor) -> Tensor:
    """A direction (D,) whose product with every state is about 1."""
    second = X.T @ X / len(X)
    ridge = second + 1e-4 * second.diagonal().mean() * torch.eye(X.shape[1])
    found: Tensor = torch.linalg.solve(ridge, X.mean(0))
    return found


def _word_map(llm: FrozenLLM) -> Tensor:
    """The (D, D) that gives a word embedding the direction that raises the LLM's logit of the word."""
    table = llm.embeddings.float().cpu()
    centred = table - table.mean(0)
    spread = centred.T @ centred / len(centred)
    inverse = torch.linalg.inv(spread + _WORD_RIDGE * spread.diagonal().mean() * torch.eye(len(spread)))
    found: Tensor = inverse / inverse.abs().max()  # words are normalised, so the scale is free
    return found


def _whitener(centred: Tensor) -> Tensor:
    """The symmetric (D, D) that gives states unit variances without correlation."""
    covariance = centred.T @ centred / len(centred)
    values, directions = torch.linalg.eigh(
        covariance + _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    )
    whitener: Tensor = directions @ torch.diag(values**-0.5) @ directions.T
    return whitener
