"""Answering: retrieve, rerank, weigh (Eq. 7 and 9), mount (Eq. 6), generate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from knowstore._loaded import LoadedModels
from knowstore.bank import ExpertBank
from knowstore.config import Filters, GenerationConfig, RetrievalConfig
from knowstore.errors import MountError
from knowstore.passages import Candidate, FaissIndex, PassageTable
from knowstore.prompts import passages_prompt, question_prompt
from knowstore.records import Answer, Hit, Mode, MountedExpert
from knowstore.retrieval import RerankItem, relevance, word_relevance

if TYPE_CHECKING:
    from knowstore.experts import Expert, Experts, FrozenLLM, Generated, Mountable

Vector = npt.NDArray[np.float32]
_ABSURD = 100.0  # times the bound on what experts add


@dataclass
class Timer:
    """Seconds by stage, in the order the stages came."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@dataclass
class Reader:
    """One snapshot's query path: the tables at `at`, the latest committed edit batch, and the models."""

    table: PassageTable
    bank: ExpertBank
    models: LoadedModels
    retrieval: RetrievalConfig
    generation: GenerationConfig
    at: int
    faiss: FaissIndex | None = None

    def retrieve(self, question: str, filters: Filters | None, timer: Timer) -> list[Hit]:
        """Candidates of Eq. 7 in the reranker's order, best first."""
        with timer.stage("embed question"):
            vector = self.models.retriever.encode_questions([question])[0]
        with timer.stage("search"):
            candidates = self._search(question, vector, filters)
        with timer.stage("rerank"):
            items = [
                RerankItem(c.title, c.text, c.segments, None, c.segment_vectors, c.vector_score) for c in candidates
            ]
            scores = self.models.reranker.score(question, items, vector) if items else []
        hits = [
            Hit(
                c.id, c.title, c.text, c.source, c.date, c.live_from, c.score, s.score, tuple(c.segments),
                s.segment_scores, s.word_scores,
            )
            for c, s in zip(candidates, scores, strict=True)
        ]  # fmt: skip
        return sorted(hits, key=lambda hit: (-hit.score, hit.passage_id))

    def _search(self, question: str, vector: Vector, filters: Filters | None) -> list[Candidate]:
        n, at = self.retrieval.n_candidates, self.at
        if self.retrieval.index == "faiss":
            if self.faiss is None or self.faiss.at != at:
                self.faiss = FaissIndex.build(self.table, at, device="cuda" if self.models.device == "cuda" else "cpu")
            return self.faiss.candidates(self.table, vector, n, filters=filters)
        if self.retrieval.search == "vector":
            return self.table.search_vector(vector, n, at=at, filters=filters)
        if self.retrieval.search == "text":
            return self.table.search_text(question, n, at=at, filters=filters, vector=vector)
        return self.table.search_hybrid(vector, question, n, at=at, filters=filters)

    def weigh(self, hits: Sequence[Hit]) -> list[MountedExpert]:
        """Eq. 9 over the best `top_k` hits, in each over its sentences and words; empty when the null option won."""
        kept = hits[: self.retrieval.top_k]
        threshold = self.retrieval.null_threshold
        if threshold == "auto":
            threshold = self.models.reranker.null_threshold
        if not kept or (threshold is not None and kept[0].score < threshold):
            return []
        temperature = self.retrieval.temperature * self.models.reranker.temperature
        weights = relevance([hit.score for hit in kept], temperature)
        are_words = self.retrieval.grain == "words"
        return [
            MountedExpert(
                hit.passage_id, weight, hit.score, hit.batch_id, hit.source, hit.title, hit.text, hit.segments,
                tuple(weight * share for share in relevance(hit.segment_scores, temperature)),
                word_relevance(hit.word_scores, weight, self.retrieval.temperature) if are_words else (),
            )
            for hit, weight in zip(kept, weights, strict=True)
        ]  # fmt: skip

    def mountable(self, mounted: Sequence[MountedExpert]) -> list[Mountable]:
        """The experts behind `mounted` with their weights, from the bank."""
        stored = self.bank.get([one.passage_id for one in mounted])
        experts = self.models.mountable([stored[one.passage_id] for one in mounted])
        return [
            (expert, one.weight, self._neuron_weights(expert, one))
            for expert, one in zip(experts, mounted, strict=True)
        ]

    def _neuron_weights(self, expert: Expert, one: MountedExpert) -> list[float] | None:
        if self.retrieval.grain == "passages":
            return None
        return self.models.neuron_weights(
            expert, (one.title, one.text, one.segments), one.segment_weights, one.word_weights
        )

    def combine(self, questions: Sequence[Sequence[MountedExpert]]) -> Experts:
        """The experts of B questions, ready to be mounted."""
        from knowstore.experts import Amplitude, combine

        hypernetwork, llm = self.models.hypernetwork, self.models.llm
        experts = combine(
            [self.mountable(mounted) for mounted in questions],
            device=llm.device,
            dtype=llm.dtype,
            static=hypernetwork.static,
            query=hypernetwork.query,
            max_norm=hypernetwork.config.max_norm,
        )
        return replace(experts, amplitude=Amplitude())

    def answer(
        self, questions: Sequence[str], mode: Mode, filters: Filters | None, on_text: Callable[[str], None] | None
    ) -> list[Answer]:
        """Answer B questions in one generation."""
        from knowstore.experts import Prompt, generate

        timer = Timer()
        all_hits = [self.retrieve(question, filters, timer) for question in questions]
        all_mounted = [self.weigh(hits) for hits in all_hits]
        with timer.stage("load models"):
            llm = self.models.llm
            layer = self.models.hypernetwork_config["layer"]
        experts = None
        if mode != "rag" and any(all_mounted):
            with timer.stage("experts"):
                self.models.check_trained()
                experts = self.combine(all_mounted)
        prompts = []
        for question, mounted in zip(questions, all_mounted, strict=True):
            before = (
                passages_prompt([(one.title, one.text) for one in mounted]) if mode != "experts" and mounted else ""
            )
            prompts.append(Prompt(before, question_prompt(question)))
        with timer.stage("generate"):
            generated = generate(llm, prompts, experts, layer, self.generation, on_text=on_text)
        seconds = {name.replace(" ", "_"): value for name, value in timer.seconds.items()}
        seconds["total"] = sum(seconds.values())
        if len(generated) == 1 and generated[0].first_token_s:
            seconds["first_token"] = generated[0].first_token_s
        return [
            Answer(
                question, one.text, mode, tuple(mounted), tuple(hits), seconds, is_null=not mounted,
                notes=_notes(one, experts),
            )
            for question, one, mounted, hits in zip(questions, generated, all_mounted, all_hits, strict=True)
        ]  # fmt: skip


def _notes(generated: Generated, experts: Experts | None) -> tuple[str, ...]:
    """What an answer's reader should know: what was cut, and experts out of all proportion."""
    notes = []
    if n_passages := generated.n_cut - generated.n_question_cut:
        notes.append(f"{n_passages} tokens of passages were cut to fit the model")
    if generated.n_question_cut:
        notes.append(f"the first {generated.n_question_cut} tokens of the question were cut to fit the model")
    if experts is not None and experts.amplitude is not None and experts.max_norm is not None:
        largest = experts.amplitude.largest
        if largest > _ABSURD * experts.max_norm:
            notes.append(
                f"experts would have added {largest:.3g} where {experts.max_norm:.3g} is the bound, and were held to "
                "it: run `knowstore verify`"
            )
    return tuple(notes)


@contextmanager
def mounted_llm(reader: Reader, mounted: Sequence[MountedExpert]) -> Iterator[FrozenLLM]:
    """The LLM with these experts on, for any number of sequences; nothing is on after the block."""
    from knowstore.experts import mount

    llm = reader.models.llm
    if not mounted:
        yield llm
        return
    reader.models.check_trained()
    experts = reader.combine([mounted])
    with mount(llm.model, experts, reader.models.hypernetwork.config.layer):
        yield llm


def given_weights(weights: Sequence[float] | None, n: int) -> list[float]:
    """The weights of n experts: equal ones when None.

    Raises:
        MountError: another number of weights than experts.
    """
    if weights is None:
        return [1.0 / n for _ in range(n)]
    if len(weights) != n:
        raise MountError(
            f"{len(weights)} weights for {n} experts",
            kept="nothing was mounted",
            fix="give one weight for each expert, or none",
        )
    return list(weights)
