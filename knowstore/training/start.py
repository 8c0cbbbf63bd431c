"""The analytic start of the `tokens` hypernetwork: statistics of the frozen LLM, no gradient step.

Why: a hypernetwork that starts near zero stays too small beside a residual stream of norm 150 to matter, and what is
learned first is the answer format. One that starts from what the LLM already understands (a word's own direction, a
state that matches itself after whitening) carries passages before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from knowstore.experts.hypernetwork import PassageInput
from knowstore.experts.llm import FrozenLLM, pad_ids
from knowstore.experts.tokens import TokensHypernetwork


@torch.no_grad()
def analytic_start(
    hypernetwork: TokensHypernetwork,
    llm: FrozenLLM,
    prompts: Sequence[tuple[list[int], int]],
    passages: Sequence[PassageInput],
    *,
    batch_size: int = 64,
) -> None:
    """Fill the hypernetwork's statistics and the weights that start from them, in place.

    Args:
        prompts: token ids of question and answer, and how many of them are the question; a few thousand.
        passages: for word frequencies.
    """
    config = hypernetwork.config
    states, writes = [], []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        x = llm.states(pad_ids([ids for ids, _ in part]), config.layer)[1].float()
        for row, (ids, n_question) in enumerate(part):
            states.append(x[row, 1 : len(ids)])
            is_writing = torch.zeros(len(ids) - 1)
            is_writing[n_question - 2 :] = 1  # from the last token of the question on, the answer is written
            writes.append(is_writing)
    X, writing = torch.cat(states).cpu(), torch.cat(writes)
    eye = torch.eye(config.width)
    mean, second = X.mean(0), X.T @ X / len(X)
    ridge = second + 1e-4 * second.diagonal().mean() * eye
    hypernetwork.x_mean.copy_(mean)
    hypernetwork.const.copy_(torch.linalg.solve(ridge, mean))
    hypernetwork.at_answer.copy_(torch.linalg.solve(ridge, X.T @ writing / len(X)))
    hypernetwork.key_in.weight.copy_(_whitener(X - mean, config.key_width))
    hypernetwork.key_out.weight.copy_(hypernetwork.key_in.weight.T)
    table = llm.embeddings.float().cpu()
    centred = table - table.mean(0)
    spread = centred.T @ centred / len(centred)
    hypernetwork.word_mean.copy_(table.mean(0))
    inverse = torch.linalg.inv(spread + 0.05 * spread.diagonal().mean() * eye)
    hypernetwork.word_map.copy_(inverse / inverse.abs().max())  # words are normalised, so the scale is free
    hypernetwork.rarity.copy_(_rarity(hypernetwork, llm, passages))


def _whitener(centred: Tensor, width: int) -> Tensor:
    """Whitening along the `width` leading principal directions, (width, D): z = x W^T has unit variances."""
    values, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    values, directions = values.flip(0), directions.flip(1)
    ridge = 0.02 * values.mean()
    whitener: Tensor = (directions[:, :width] / (values[:width] + ridge).sqrt()).T
    return whitener


def _rarity(hypernetwork: TokensHypernetwork, llm: FrozenLLM, passages: Sequence[PassageInput]) -> Tensor:
    """How rare each token is in passages, 0 to 1: the cube of its inverse document frequency over the largest."""
    counts = torch.zeros(hypernetwork.config.vocabulary)
    for passage in passages:
        ids = torch.tensor(hypernetwork.tokenise(llm, passage)[0])
        counts.index_add_(0, ids, torch.ones(len(ids)))
    idf = torch.log(counts.sum() / (counts + 1))
    rarity: Tensor = (idf / idf.max()).clamp(min=0) ** 3
    return rarity
