"""The LLM as it is: closed book, and with the passage in the prompt (RAG), which is the caller's to set there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowstore.baselines.edits import Edit, Edited, Teach
from knowstore.prompts import passages_prompt
from knowstore.records import Passage

if TYPE_CHECKING:
    from knowstore._loaded import OnProgress
    from knowstore.experts import FrozenLLM


@dataclass(frozen=True)
class Unedited:
    """No edit; with `keeps_passages` (RAG) the bytes of the passages count as kept."""

    name: str = "base"
    keeps_passages: bool = False

    def prepare(self, llm: FrozenLLM, on_progress: OnProgress | None = None) -> None:
        """Nothing is needed."""

    @contextmanager
    def teaching(self, llm: FrozenLLM) -> Iterator[Teach]:
        """Leave the LLM alone."""
        n_bytes = 0

        def teach(edits: Sequence[Edit]) -> Edited:
            nonlocal n_bytes
            n_bytes += sum(text_bytes(edit.passage) for edit in edits) if self.keeps_passages else 0
            return Edited(0.0, n_bytes)

        yield teach


def text_bytes(passage: Passage) -> int:
    """The bytes of a passage as it stands in a prompt."""
    return len(passages_prompt([(passage.title, passage.text)]).encode())
