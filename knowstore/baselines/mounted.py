"""The store's own method behind the baselines' interface: generated experts, mounted for the question."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowstore._answering import combine_weighed
from knowstore._loaded import LoadedModels, OnProgress
from knowstore.baselines.edits import Edit, Edited, EditQuestion, Served, Teach
from knowstore.baselines.search import Indexed, TaughtSearch
from knowstore.config import RetrievalConfig
from knowstore.records import Passage

if TYPE_CHECKING:
    from knowstore.experts import Expert, FrozenLLM

_FLOAT16_BYTES = 2


@dataclass(frozen=True)
class MountedExperts:
    """Experts of the passages, weighed as `ask` weighs them; with `finds_passages` they are looked for, see
    `TaughtSearch`. Experts count as kept in float16, as the bank keeps them by default."""

    models: LoadedModels
    finds_passages: bool = False

    @property
    def name(self) -> str:
        kind: str = self.models.hypernetwork_config["kind"]
        return f"{kind}, found" if self.finds_passages else kind

    def prepare(self, llm: FrozenLLM, on_progress: OnProgress | None = None) -> None:
        """Load hypernetwork, retriever and reranker."""
        self.models.check_trained()
        _ = self.models.hypernetwork, self.models.retriever, self.models.reranker

    @contextmanager
    def teaching(self, llm: FrozenLLM) -> Iterator[Teach]:
        """Generate an expert and vectors for each passage, one passage at a time; the LLM is not touched."""
        search = TaughtSearch(self.models, self.finds_passages)
        taught: list[Indexed] = []
        experts: dict[str, Expert] = {}

        def serve(asked: Sequence[EditQuestion]) -> Served:
            return Served(combine_weighed(search.choose(taught, asked), experts, self.models, RetrievalConfig.grain))

        def teach(edits: Sequence[Edit]) -> Edited:
            started = time.perf_counter()
            for edit in edits:
                taught.append(search.index(edit.passage))
                experts[edit.passage.passage_id] = self._generate(llm, edit.passage, taught[-1])
            seconds = time.perf_counter() - started
            kept = sum(_FLOAT16_BYTES * tensor.numel() for one in experts.values() for tensor in one.tensors.values())
            return Edited(seconds, kept, serve, self.models.hypernetwork.config.layer)

        yield teach

    def _generate(self, llm: FrozenLLM, passage: Passage, indexed: Indexed) -> Expert:
        from knowstore.experts import PassageInput

        spans = tuple(indexed.item.spans)
        [expert] = self.models.hypernetwork.generate(llm, [PassageInput(passage.title, passage.text, spans)])
        return expert
