"""The passages that were taught, looked for and weighed as `ask` does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from knowstore._answering import scored_hit, superseded, twins, weigh
from knowstore._loaded import LoadedModels
from knowstore.baselines.edits import EditQuestion
from knowstore.config import RetrievalConfig
from knowstore.records import MountedExpert, Passage
from knowstore.retrieval import RerankItem
from knowstore.sources import sentence_spans


@dataclass(frozen=True)
class Indexed:
    """A passage as the reranker takes it."""

    passage_id: str
    item: RerankItem


@dataclass(frozen=True)
class TaughtSearch:
    """Chooses passages for questions and weighs them (Eq. 9).

    With `finds_passages` they are looked for among all passages that were taught, by their vectors alone (Eq. 7), an
    older one gives way to a newer that says nearly the same, and none is chosen where the null option wins. Without,
    the passages that state the answer are known.
    """

    models: LoadedModels
    finds_passages: bool = False

    def index(self, passage: Passage) -> Indexed:
        """A passage with the vectors that it is found by."""
        spans = tuple(sentence_spans(passage.text))
        [(vector, segment_vectors)] = self.models.retriever.encode_passages([passage], [spans])
        return Indexed(passage.passage_id, RerankItem(passage.title, passage.text, spans, vector, segment_vectors))

    def choose(self, taught: Sequence[Indexed], asked: Sequence[EditQuestion]) -> list[list[MountedExpert]]:
        """For each question passages with their weights; `taught` are all, in the order in which they were taught."""
        vectors = self.models.retriever.encode_questions([one.question for one in asked])
        return [self._chosen(taught, one, vector) for one, vector in zip(asked, vectors, strict=True)]

    def _chosen(self, taught: Sequence[Indexed], asked: EditQuestion, vector: np.ndarray) -> list[MountedExpert]:
        places = self._found(taught, vector) if self.finds_passages else list(asked.edits)
        if not places:
            return []
        some = {taught[place].passage_id: taught[place].item for place in places}
        scores = self.models.reranker.score(asked.question, list(some.values()), vector)
        newer = _newer_twins(asked.question, taught, some) if self.finds_passages else {}
        hits = [
            scored_hit(passage_id, item, score, newer_twin=newer.get(passage_id))
            for (passage_id, item), score in zip(some.items(), scores, strict=True)
        ]
        settings = RetrievalConfig() if self.finds_passages else RetrievalConfig(null_threshold=None)
        return weigh(sorted(hits, key=lambda hit: (-hit.score, hit.passage_id)), settings, self.models.reranker)

    def _found(self, taught: Sequence[Indexed], vector: np.ndarray) -> list[int]:
        """Places of the nearest passages; one that was taught again is one candidate, as in a store."""
        known = {one.passage_id: (place, one.item.vector) for place, one in enumerate(taught)}
        places = [place for place, _ in known.values()]
        similarity = np.stack([one for _, one in known.values() if one is not None]) @ vector
        return [places[index] for index in np.argsort(-similarity, kind="stable")[: RetrievalConfig.n_candidates]]


def _newer_twins(question: str, taught: Sequence[Indexed], some: Mapping[str, RerankItem]) -> dict[str, str]:
    """Of passages each that has a twin which was taught later, with that."""
    overlap, ids = RetrievalConfig.twin_overlap, list(some)
    pairs = [] if overlap is None else twins(question, [(item.title, item.text) for item in some.values()], overlap)
    since = {one.passage_id: place for place, one in enumerate(taught)}
    return superseded([(ids[one], ids[other]) for one, other in pairs], since)
