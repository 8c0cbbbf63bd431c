"""RAG as the store does it behind the baselines' interface: passages are looked for and read by the tuned reader."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowstore._loaded import LoadedModels, OnProgress
from knowstore.baselines.edits import Edit, Edited, EditQuestion, Served, Teach
from knowstore.baselines.prompted import text_bytes
from knowstore.baselines.search import Indexed, TaughtSearch

if TYPE_CHECKING:
    from knowstore.experts import FrozenLLM


@dataclass(frozen=True)
class ReadPassages:
    """`ask --mode rag` over the passages that were taught; without a reader for the LLM it reads as it is."""

    models: LoadedModels
    name: str = "rag, found"

    def prepare(self, llm: FrozenLLM, on_progress: OnProgress | None = None) -> None:
        """Load retriever, reranker and reader."""
        _ = self.models.retriever, self.models.reranker, self.models.reader

    @contextmanager
    def teaching(self, llm: FrozenLLM) -> Iterator[Teach]:
        """Keep each passage with its vectors; the LLM is not touched."""
        search = TaughtSearch(self.models, finds_passages=True)
        taught: list[Indexed] = []
        n_bytes = 0

        def teach(edits: Sequence[Edit]) -> Edited:
            nonlocal n_bytes
            started = time.perf_counter()
            taught.extend(search.index(edit.passage) for edit in edits)
            n_bytes += sum(text_bytes(edit.passage) for edit in edits)
            layer = 0 if self.models.reader is None else self.models.hypernetwork_config["layer"]
            return Edited(time.perf_counter() - started, n_bytes, serve, layer)

        def serve(asked: Sequence[EditQuestion]) -> Served:
            from knowstore.experts import on_where

            chosen = search.choose(taught, asked)
            tuned = self.models.reader_experts
            if tuned is None or not any(chosen):
                return Served(None, chosen)
            return Served(on_where([bool(some) for some in chosen], tuned), chosen)

        yield teach
