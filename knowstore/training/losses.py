"""Losses of the `tokens` hypernetwork.

    pointing    the keys alone: at each step of an answer the LLM's state must score the passage's next answer token
                above all other tokens of the passage (and of its sentence), and none of another passage's
    answering   Eq. 5: the likelihood of the answer with the experts mounted, as they are served

Pointing costs no pass through the blocks above the mount layer, and its gradient reaches the keys at once. An expert
that points well needs little of Eq. 5 to answer well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_NEVER = -1e4


@dataclass(frozen=True)
class Pointers:
    """Where answers stand: for Q questions of J answer steps on passages of T tokens.

    `target` (Q, J, T + 1) marks the tokens that may be written at a step, the last column for none of them (the end
    of the answer); `valid` (Q, J) the steps that there are; `sentence` (Q, T) the tokens of the answer's sentence.
    """

    target: Tensor
    valid: Tensor
    sentence: Tensor

    def to(self, device: torch.device) -> Pointers:
        return Pointers(self.target.to(device), self.valid.to(device), self.sentence.to(device))


def pointers(
    starts: Sequence[Sequence[int]], n_steps: Sequence[int], sentences: Sequence[tuple[int, int]], n_tokens: int
) -> Pointers:
    """Targets of Q questions.

    Args:
        starts: the tokens at which the answer starts, wherever the passage states it.
        n_steps: tokens of the answer, its end included.
        sentences: the token span of the sentence of the first of `starts`.
        n_tokens: T.
    """
    target = torch.zeros(len(starts), max(n_steps), n_tokens + 1, dtype=torch.bool)
    valid = torch.zeros(target.shape[:2], dtype=torch.bool)
    sentence = torch.zeros(len(starts), n_tokens, dtype=torch.bool)
    for row, (places, n, (first, last)) in enumerate(zip(starts, n_steps, sentences, strict=True)):
        for step in range(n - 1):
            target[row, step, [place + step for place in places]] = True
        target[row, n - 1, n_tokens] = True
        valid[row, :n] = True
        sentence[row, first:last] = True
    return Pointers(target, valid, sentence)


def pointing_loss(scores: Tensor, mask: Tensor, where: Pointers) -> Tensor:
    """Mean of minus the log-probability of each step's target, among the passage's tokens and the sentence's.

    Args:
        scores: (Q, J, T) of `TokensHypernetwork.scores`, 0 being none of the tokens.
        mask: (Q, T), the tokens that have a neuron.
    """
    none = torch.zeros_like(scores[..., :1])
    losses = []
    for allowed in (mask, where.sentence):
        logits = torch.cat([scores.masked_fill(~allowed[:, None], _NEVER), none], -1)
        right = logits.masked_fill(~where.target, _NEVER).logsumexp(-1)
        losses.append((logits.logsumexp(-1) - right)[where.valid & (right > _NEVER / 2)].mean())
    return losses[0] + losses[1]


def silence_loss(scores: Tensor, mask: Tensor, where: Pointers) -> Tensor:
    """Mean of minus the log-probability of writing none of another passage's tokens: "do nothing" there."""
    none = torch.zeros_like(scores[..., :1])
    logits = torch.cat([scores.masked_fill(~mask[:, None], _NEVER), none], -1)
    return logits.logsumexp(-1)[where.valid].mean()


def pointing_accuracy(scores: Tensor, where: Pointers) -> Tensor:
    """(Q,) whether the first token that is pointed at within the answer's sentence is right."""
    first = scores[:, 0].masked_fill(~where.sentence, _NEVER).argmax(-1)
    return where.target[:, 0].gather(1, first[:, None])[:, 0]
