"""The store's own method behind the baselines' interface: generated experts, mounted for the question."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowstore._answering import combine_weighed
from knowstore._loaded import LoadedModels, OnProgress
from knowstore.bank import EncodedExpert, StoredExpert
from knowstore.baselines.edits import Edit, Edited, EditQuestion, Served, Teach
from knowstore.baselines.search import Indexed, TaughtSearch
from knowstore.config import BankConfig, RetrievalConfig
from knowstore.records import Passage

if TYPE_CHECKING:
    from knowstore.experts import FrozenLLM

_BATCH = 0  # there are no edit batches


@dataclass(frozen=True)
class MountedExperts:
    """Experts of the passages, weighed as `ask` weighs them; with `finds_passages` they are looked for, see
    `TaughtSearch`. They are kept by the codec that a new store has by default."""

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
        made: dict[str, EncodedExpert] = {}

        def read(ids: Sequence[str]) -> dict[str, StoredExpert]:
            return {passage_id: made[passage_id].decode() for passage_id in ids}

        def serve(asked: Sequence[EditQuestion]) -> Served:
            chosen = search.choose(taught, asked)
            return Served(combine_weighed(chosen, read, self.models, RetrievalConfig.grain))

        def teach(edits: Sequence[Edit]) -> Edited:
            started = time.perf_counter()
            for edit in edits:
                taught.append(search.index(edit.passage))
                made[edit.passage.passage_id] = self._generate(edit.passage, taught[-1])
            seconds = time.perf_counter() - started
            kept = sum(len(one.data) for one in made.values())
            return Edited(seconds, kept, serve, self.models.hypernetwork.config.layer)

        yield teach

    def _generate(self, passage: Passage, indexed: Indexed) -> EncodedExpert:
        from knowstore.experts import PassageInput

        inputs = [PassageInput(passage.title, passage.text, tuple(indexed.item.spans))]
        [made] = self.models.generate([passage.passage_id], inputs, latent=BankConfig.codec == "latent")
        return EncodedExpert.make(made, BankConfig.codec, self.models.fingerprints["experts"], _BATCH)
