"""Further training signals beside Eq. 5; each has a weight in `TrainingConfig`, and 0 leaves it out.

    distil      at each step of the answer, as likely next words as for the tuned reader with the passage in its prompt
    contrast    the answer is likelier with its passage's expert than with another passage's
    nothing     with another passage's expert the model goes on as with no passage's: "do nothing" there
    completion  with its own expert, and no question, the model completes the passage from a few words of it

The last three mount experts in a pass of their own, where no gradient reaches what belongs to no passage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from knowstore.experts.expert import Experts, Factors, QueryExperts


@dataclass(frozen=True, eq=False)
class AnswerSteps:
    """All N answer tokens of a batch: `logits` (N, V) from which each is written, the `targets` (N,), and the question
    `rows` (N,) that each is of."""

    logits: Tensor
    targets: Tensor
    rows: Tensor

    def nats(self) -> Tensor:
        """Eq. 5: the mean over all of them."""
        return cross_entropy(self.logits, self.targets)

    def nats_each(self, n_questions: int) -> Tensor:
        """(Q,) the mean over each question's."""
        each = cross_entropy(self.logits, self.targets, reduction="none")
        sums = each.new_zeros(n_questions).index_add(0, self.rows, each)
        return sums / self.rows.bincount(minlength=n_questions).clamp(min=1)


class Teacher(ABC):
    """What says how likely next words are at each step of an answer, with the passage before its eyes."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies it."""

    @abstractmethod
    def taught(self, rows: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """The likeliest next words at all N answer tokens of some (passage, question), and their shares: (N, k)."""


@dataclass(frozen=True)
class Signals:
    """The weights of the module's signals, and the teacher of the first."""

    distil_weight: float = 0.0
    contrast_weight: float = 0.0
    nothing_weight: float = 0.0
    completion_weight: float = 0.0
    teacher: Teacher | None = None

    @property
    def needs_another(self) -> bool:
        """Whether another passage's expert is mounted."""
        return bool(self.contrast_weight or self.nothing_weight)


def distillation_loss(logits: Tensor, ids: Tensor, probabilities: Tensor) -> Tensor:
    """Mean over N steps of KL(teacher || model), as if one of the teacher's k likeliest words had to come next.

    Args:
        logits: (N, V) of the model.
        ids, probabilities: (N, k) of the teacher; each row of probabilities is scaled to sum to 1.
    """
    p = probabilities / probabilities.sum(-1, keepdim=True)
    log_q = logits.float().log_softmax(-1).gather(1, ids)
    each: Tensor = torch.special.xlogy(p, p) - p * log_q
    return each.sum(-1).mean()


def contrast_loss(own: Tensor, other: Tensor) -> Tensor:
    """Mean over Q questions of minus the log-probability that the right one of two passages was mounted.

    Args:
        own, other: (Q,) nats per answer token with the passage's expert and with another's.
    """
    return softplus(own - other).mean()


def nothing_loss(logits: Tensor, before: Tensor) -> Tensor:
    """Mean over N steps of KL(before || now): `logits` (N, V) with another passage's expert, `before` without."""
    log_p, log_q = before.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def without_passages(experts: Experts) -> Experts:
    """What of the experts belongs to no passage."""
    return Experts(static=experts.static, query=experts.query, max_norm=experts.max_norm)


def held(experts: Experts) -> Experts:
    """The same experts, of which no gradient reaches what belongs to no passage."""
    static, query = experts.static, experts.query
    if static is not None:
        static = Factors(*(part.detach() for part in (static.up1, static.up2, static.dw1, static.dw2)))
    if query is not None:
        up, down = (tuple(part.detach() for part in parts) for parts in (query.up, query.down))
        query = QueryExperts(query.layers, up, down)
    return replace(experts, static=static, query=query)
