"""What knowledge-editing methods are given, and the interface that they share; torch is not needed to read edits.

A method sees a passage and facts made of it (the paper's Appendix D: question-answer pairs, with their subjects). Which
of the two it uses is its own affair: experts and RAG take the passage, MEMIT the facts, LoRA both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from knowstore.records import Passage

if TYPE_CHECKING:
    from knowstore._loaded import OnProgress
    from knowstore.experts import Experts, FrozenLLM
    from knowstore.records import MountedExpert

Kind = Literal["efficacy", "paraphrase", "unseen", "portability", "neighbourhood"]
"""What a probe asks: the fact as it was taught, the same in other words, something else that the passage says,
what follows from the fact, or something that the edit must leave alone."""


@dataclass(frozen=True)
class TaughtFact:
    """What a method is taught: a question, its answer `target`, and the `subject` that the question is about, as it
    stands in the question."""

    question: str
    subject: str
    target: str


@dataclass(frozen=True)
class Edit:
    """One piece of knowledge to teach: a passage that states it, and facts made of the passage."""

    passage: Passage
    facts: tuple[TaughtFact, ...]


@dataclass(frozen=True)
class EditProbe:
    """What is asked after a row's edits: a question with its accepted answers; `edits` are the places, in its row, of
    the edits that state the answer."""

    kind: Kind
    question: str
    answers: tuple[str, ...]
    edits: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class EditRow:
    """Edits in the order in which they are taught, the newer superseding the older, and what is asked afterwards.

    `untaught_answers` are right to the first probe where nothing was taught; none where they are not known.
    """

    row_id: str
    edits: tuple[Edit, ...]
    probes: tuple[EditProbe, ...]
    untaught_answers: tuple[str, ...] = ()

    @property
    def questions(self) -> frozenset[str]:
        """Everything that is asked or taught."""
        taught = {fact.question for edit in self.edits for fact in edit.facts}
        return frozenset(taught | {probe.question for probe in self.probes})


@dataclass(frozen=True)
class EditQuestion:
    """What a method is told of a question: its text, and the places, among the edits that were taught, of those whose
    passages state the answer."""

    question: str
    edits: tuple[int, ...]


@dataclass(frozen=True)
class Served:
    """What B questions are answered with: experts to mount, and for each question the passages that the method itself
    puts in the prompt; None where it has none or leaves that to the caller."""

    experts: Experts | None = None
    passages: Sequence[Sequence[MountedExpert]] | None = None


@dataclass(frozen=True)
class Edited:
    """A frozen LLM that knows edits.

    Args:
        seconds: what teaching the last of them took, those that were given together.
        kept_bytes: what must be kept to have all edits so far again.
        serve: what B questions are answered with, of a method that mounts or reads; None where the weights know.
        layer: 0-based block of its experts.
    """

    seconds: float
    kept_bytes: int
    serve: Callable[[Sequence[EditQuestion]], Served] | None = None
    layer: int = 0


Teach = Callable[[Sequence[Edit]], Edited]
"""Teaches edits one after another, behind those that it was given before."""


class Method(Protocol):
    """A way to teach a frozen LLM edits and to take them back."""

    @property
    def name(self) -> str:
        """As the bench and its tables call it."""
        ...

    def prepare(self, llm: FrozenLLM, on_progress: OnProgress | None = None) -> None:
        """Do once, before any edit, what the method needs for this LLM: statistics, a trained editor."""
        ...

    def teaching(self, llm: FrozenLLM) -> AbstractContextManager[Teach]:
        """Begin with the untouched LLM; after the `with` block it is bit for bit what it was."""
        ...
