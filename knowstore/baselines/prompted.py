"""The LLM as it is: closed book, and with the passage in the prompt (RAG), which is the caller's to set there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowstore.baselines.edits import Edit, Edited
from knowstore.prompts import passages_prompt

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
    def edit(self, llm: FrozenLLM, edits: Sequence[Edit]) -> Iterator[Edited]:
        """Leave the LLM alone."""
        texts = [passages_prompt([(edit.passage.title, edit.passage.text)]) for edit in edits]
        yield Edited(0.0, sum(len(text.encode()) for text in texts) if self.keeps_passages else 0)
