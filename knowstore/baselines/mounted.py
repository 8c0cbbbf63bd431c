"""The store's own method behind the baselines' interface: generated experts, mounted for the question."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from knowstore._answering import combine_weighed, scored_hit, superseded, twins, weigh
from knowstore._loaded import LoadedModels, OnProgress
from knowstore.baselines.edits import Edit, Edited, EditQuestion
from knowstore.config import RetrievalConfig
from knowstore.records import MountedExpert
from knowstore.retrieval import RerankItem
from knowstore.sources import sentence_spans

if TYPE_CHECKING:
    from knowstore.experts import Expert, Experts, FrozenLLM

_FLOAT16_BYTES = 2


@dataclass(frozen=True)
class _Taught:
    """The expert of an edit's passage, and the passage as the reranker takes it."""

    passage_id: str
    expert: Expert
    item: RerankItem


@dataclass(frozen=True)
class MountedExperts:
    """Experts of the passages, weighed as `ask` weighs them (Eq. 9).

    With `finds_passages` they are looked for among all passages that were taught, by their vectors alone (Eq. 7), an
    older one gives way to a newer that says nearly the same, and none is mounted where the null option wins. Without,
    the passages that state the answer are known (`gold` of `bench controls`). Experts count as kept in float16, as the
    bank keeps them by default.
    """

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
    def edit(self, llm: FrozenLLM, edits: Sequence[Edit]) -> Iterator[Edited]:
        """Generate an expert and vectors for each passage, one passage at a time; the LLM is not touched."""
        started = time.perf_counter()
        taught = [self._teach(llm, edit) for edit in edits]
        seconds = time.perf_counter() - started
        kept = sum(_FLOAT16_BYTES * tensor.numel() for one in taught for tensor in one.expert.tensors.values())
        yield Edited(seconds, kept, lambda asked: self._mounted(taught, asked), self.models.hypernetwork.config.layer)

    def _teach(self, llm: FrozenLLM, edit: Edit) -> _Taught:
        from knowstore.experts import PassageInput

        passage, spans = edit.passage, tuple(sentence_spans(edit.passage.text))
        [expert] = self.models.hypernetwork.generate(llm, [PassageInput(passage.title, passage.text, spans)])
        [(vector, segment_vectors)] = self.models.retriever.encode_passages([passage], [spans])
        return _Taught(
            passage.passage_id, expert, RerankItem(passage.title, passage.text, spans, vector, segment_vectors)
        )

    def _mounted(self, taught: Sequence[_Taught], asked: Sequence[EditQuestion]) -> Experts:
        vectors = self.models.retriever.encode_questions([one.question for one in asked])
        chosen = [self._chosen(taught, one, vector) for one, vector in zip(asked, vectors, strict=True)]
        experts = {one.passage_id: one.expert for one in taught}
        return combine_weighed(chosen, experts, self.models, RetrievalConfig.grain)

    def _chosen(self, taught: Sequence[_Taught], asked: EditQuestion, vector: np.ndarray) -> list[MountedExpert]:
        """The experts for a question with their weights."""
        places = self._found(taught, vector) if self.finds_passages else list(asked.edits)
        some = {taught[place].passage_id: taught[place].item for place in places}
        scores = self.models.reranker.score(asked.question, list(some.values()), vector)
        newer = _newer_twins(taught, some) if self.finds_passages else {}
        hits = [
            scored_hit(passage_id, item, score, newer_twin=newer.get(passage_id))
            for (passage_id, item), score in zip(some.items(), scores, strict=True)
        ]
        settings = RetrievalConfig() if self.finds_passages else RetrievalConfig(null_threshold=None)
        return weigh(sorted(hits, key=lambda hit: (-hit.score, hit.passage_id)), settings, self.models.reranker)

    def _found(self, taught: Sequence[_Taught], vector: np.ndarray) -> list[int]:
        similarity = np.stack([one.item.vector for one in taught if one.item.vector is not None]) @ vector
        return [int(place) for place in np.argsort(-similarity, kind="stable")[: RetrievalConfig.n_candidates]]


def _newer_twins(taught: Sequence[_Taught], some: Mapping[str, RerankItem]) -> dict[str, str]:
    """Of passages each that has a twin which was taught later, with that."""
    overlap, ids = RetrievalConfig.twin_overlap, list(some)
    pairs = [] if overlap is None else twins([(item.title, item.text) for item in some.values()], overlap)
    since = {one.passage_id: place for place, one in enumerate(taught)}
    return superseded([(ids[one], ids[other]) for one, other in pairs], since)
