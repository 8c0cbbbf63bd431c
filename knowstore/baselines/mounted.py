"""The store's own method behind the baselines' interface: generated experts, mounted for the question."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from knowstore._loaded import LoadedModels, OnProgress
from knowstore.baselines.edits import Asked, Edit, Edited
from knowstore.config import RetrievalConfig
from knowstore.retrieval import RerankItem, relevance, word_relevance
from knowstore.sources import sentence_spans

if TYPE_CHECKING:
    from knowstore.experts import Expert, Experts, FrozenLLM, Mountable

_FLOAT16_BYTES = 2


@dataclass(frozen=True)
class _Taught:
    """The expert of an edit's passage, and the passage as the reranker takes it."""

    expert: Expert
    item: RerankItem


@dataclass(frozen=True)
class MountedExperts:
    """Experts of the passages, weighed by the reranker at the default grain.

    With `finds_passages` they are chosen as `ask` chooses: among all passages that were taught, and none where the
    null option wins. Without, the passages that state the answer are known (`gold` of `bench controls`). Experts
    count as kept in float16, as the bank keeps them by default.
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
        yield Edited(
            seconds, kept, lambda asked: self._mounted(llm, taught, asked), self.models.hypernetwork.config.layer
        )

    def _teach(self, llm: FrozenLLM, edit: Edit) -> _Taught:
        from knowstore.experts import PassageInput

        passage, spans = edit.passage, tuple(sentence_spans(edit.passage.text))
        [expert] = self.models.hypernetwork.generate(llm, [PassageInput(passage.title, passage.text, spans)])
        [(vector, segment_vectors)] = self.models.retriever.encode_passages([passage], [spans])
        return _Taught(expert, RerankItem(passage.title, passage.text, spans, vector, segment_vectors))

    def _mounted(self, llm: FrozenLLM, taught: Sequence[_Taught], asked: Sequence[Asked]) -> Experts:
        from knowstore.experts import combine

        network = self.models.hypernetwork
        vectors = self.models.retriever.encode_questions([one.question for one in asked])
        return combine(
            [self._chosen(taught, one, vector) for one, vector in zip(asked, vectors, strict=True)],
            device=llm.device,
            dtype=llm.dtype,
            static=network.static,
            query=network.query,
            max_norm=network.config.max_norm,
        )

    def _chosen(self, taught: Sequence[_Taught], asked: Asked, vector: np.ndarray) -> list[Mountable]:
        """The experts for a question with their weights: Eq. 9 over passages, within each over sentences and words."""
        settings, reranker = RetrievalConfig(), self.models.reranker
        some = self._candidates(taught, asked, vector)
        scores = reranker.score(asked.question, [one.item for one in some], vector)
        order = sorted(range(len(some)), key=lambda place: -scores[place].score)[: settings.top_k]
        threshold = reranker.null_threshold if self.finds_passages else None
        if threshold is not None and scores[order[0]].score < threshold:
            return []
        temperature = settings.temperature * reranker.temperature
        weights = relevance([scores[place].score for place in order], temperature)
        out: list[Mountable] = []
        for place, weight in zip(order, weights, strict=True):
            one = some[place]
            segments = [weight * share for share in relevance(scores[place].segment_scores, temperature)]
            passage = one.item.title, one.item.text, one.item.spans
            is_by_word = settings.grain == "words" and segments
            words = word_relevance(scores[place].word_scores, one.item.spans, segments) if is_by_word else ()
            out.append((one.expert, weight, self.models.neuron_weights(one.expert, passage, segments, words)))
        return out

    def _candidates(self, taught: Sequence[_Taught], asked: Asked, vector: np.ndarray) -> list[_Taught]:
        if not self.finds_passages:
            return [taught[place] for place in asked.edits]
        similarity = np.stack([one.item.vector for one in taught if one.item.vector is not None]) @ vector
        return [taught[place] for place in np.argsort(-similarity, kind="stable")[: RetrievalConfig().n_candidates]]
