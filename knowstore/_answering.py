"""Answering: retrieve, rerank, weigh (Eq. 7 and 9), mount (Eq. 6), generate."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from knowstore._loaded import LoadedModels
from knowstore.bank import StoredExpert
from knowstore.config import Filters, GenerationConfig, Grain, RetrievalConfig
from knowstore.errors import MountError
from knowstore.passages import Candidate, FaissIndex, PassageTable, PlacedFilters
from knowstore.prompts import passages_prompt, question_prompt
from knowstore.records import Answer, Hit, Mode, MountedExpert, Passage
from knowstore.retrieval import Reranker, RerankItem, RerankScore, relevance, word_relevance

if TYPE_CHECKING:
    from knowstore.experts import Experts, FrozenLLM, Generated, Mountable, Prompt

Vector = npt.NDArray[np.float32]
ASKED_AT_ONCE = 1024  # questions of which all that was found is in memory
_BATCH_CHARACTERS = 1 << 16  # of padded prompts in one generation, about 16,000 tokens
_ABSURD = 100.0  # times the bound on what experts add
_LEAST_RELEVANCE = 1e-3  # of the best passage's: what is less is next to nothing
_WORD = re.compile(r"\w+")
_STATEMENT = 40  # words of a text that says one thing, at most
_ALIKE = 3  # words that two statements of the same share, at least


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


class ExpertSource(Protocol):
    """Where experts come from: the bank, or what stands in for it."""

    def get(self, ids: Sequence[str]) -> dict[str, StoredExpert]:
        """Experts by passage id."""
        ...


@dataclass
class Reader:
    """One snapshot's query path: the tables at `at`, the latest committed edit batch, and the models; `introduced`
    gives the edit batch that brought each of some passages, that of its row when None; `shared` gives the passages that
    a source shares with others, none when None."""

    table: PassageTable
    bank: ExpertSource
    models: LoadedModels
    retrieval: RetrievalConfig
    generation: GenerationConfig
    at: int
    faiss: FaissIndex | None = None
    introduced: Callable[[Collection[str]], Mapping[str, int]] | None = None
    shared: Callable[[str], Collection[str]] | None = None

    def retrieve(self, question: str, filters: Filters | None, timer: Timer, *, n_best: int | None = None) -> list[Hit]:
        """Candidates of Eq. 7 in the reranker's order, best first; when `n_best` is given, the others may be scored in
        less detail, and so may those of next to no relevance."""
        with timer.stage("embed question"):
            vector = self.models.retriever.encode_questions([question])[0]
        with timer.stage("search"):
            candidates = self._search(question, vector, self.placed(filters))
        with timer.stage("rerank"):
            items = [
                RerankItem(c.title, c.text, c.segments, None, c.segment_vectors, c.vector_score) for c in candidates
            ]
            newer = self._newer_twins(question, candidates)
            margin = math.inf
            if n_best and newer:
                n_best += len(newer)  # what has a newer twin makes room for others, which may score far less
            elif n_best:
                margin = -math.log(_LEAST_RELEVANCE) * self.retrieval.temperature
            score = self.models.reranker.score
            scores = score(question, items, vector, n_best=n_best, margin=margin) if items else []
        hits = [
            Hit(
                c.id, c.title, c.text, c.source, c.date, c.live_from, c.score, s.score, tuple(c.segments),
                s.segment_scores, s.word_scores, newer.get(c.id),
            )
            for c, s in zip(candidates, scores, strict=True)
        ]  # fmt: skip
        return sorted(hits, key=lambda hit: (-hit.score, hit.passage_id))

    def _newer_twins(self, question: str, candidates: Sequence[Candidate]) -> dict[str, str]:
        """Of each candidate that has one a twin from a newer edit batch, by passage id."""
        overlap = self.retrieval.twin_overlap
        pairs = [] if overlap is None else twins(question, [(c.title, c.text) for c in candidates], overlap)
        if not pairs:
            return {}
        since: Mapping[str, int] = {c.id: c.live_from for c in candidates}
        if self.introduced is not None:
            since = {**since, **self.introduced([candidates[place].id for pair in pairs for place in pair])}
        return superseded([(candidates[a].id, candidates[b].id) for a, b in pairs], since)

    def _search(self, question: str, vector: Vector, filters: Filters | None) -> list[Candidate]:
        n, at = self.retrieval.n_candidates, self.at

        def by_vector(n: int) -> list[Candidate]:
            if self.retrieval.index == "lance":
                return self.table.search_vector(vector, n, at=at, filters=filters)
            if self.faiss is None or self.faiss.at != at:
                self.faiss = FaissIndex.build(self.table, at, device="cuda" if self.models.device == "cuda" else "cpu")
            return self.faiss.candidates(self.table, vector, n, filters=filters)

        if self.retrieval.search == "vector":
            return by_vector(n)
        if self.retrieval.search == "text":
            return self.table.search_text(question, n, at=at, filters=filters, vector=vector)
        return self.table.search_hybrid(vector, question, n, at=at, filters=filters, by_vector=by_vector)

    def placed(self, filters: Filters | None) -> Filters | None:
        """Filters that also let through the passages which the source that is asked for shares with others."""
        if filters is None or filters.source is None or self.shared is None or isinstance(filters, PlacedFilters):
            return filters
        return PlacedFilters(**asdict(filters), shared=tuple(sorted(self.shared(filters.source))))

    def weigh(self, hits: Sequence[Hit]) -> list[MountedExpert]:
        """`weigh` with this reader's settings and reranker."""
        return weigh(hits, self.retrieval, self.models.reranker)

    def read(self, mounted: Sequence[MountedExpert], mode: Mode) -> Sequence[MountedExpert]:
        """Of the passages that were weighed for a question, those that the mode reads in the prompt."""
        return mounted[: {"experts": 0, "rag": None, "hybrid": self.retrieval.n_read}[mode]]

    def combine(self, questions: Sequence[Sequence[MountedExpert]]) -> Experts:
        """The experts of B questions, read from the bank and materialised at once, ready to be mounted."""
        from knowstore.experts import Amplitude

        combined = combine_weighed(questions, self.bank.get, self.models, self.retrieval.grain)
        return replace(combined, amplitude=Amplitude())

    def experts(self, questions: Sequence[Sequence[MountedExpert]], mode: Mode) -> Experts | None:
        """What is mounted to answer B questions: the passages' experts where the mode has them, and where passages are
        read in the prompt the reader's in the place of the static ones; None for nothing."""
        from knowstore.experts import on_where

        if not any(questions):
            return None
        tuned = None if mode == "experts" else self.models.reader_experts
        if mode == "rag":
            return None if tuned is None else on_where([bool(mounted) for mounted in questions], tuned)
        self.models.check_trained()
        experts = self.combine(questions)
        return experts if tuned is None else replace(experts, static=tuned.static, query=tuned.query)

    def answer(
        self,
        questions: Sequence[str],
        mode: Mode,
        filters: Filters | None,
        on_text: Callable[[str], None] | None = None,
        *,
        batch_size: int = 1,
        has_details: bool = True,
    ) -> list[Answer]:
        """Answer questions, at most `batch_size` in one generation, of a thousand those with prompts of similar length
        together; without `has_details` as `brief` tells them."""
        filters = self.placed(filters)
        found: list[Answer] = []
        for first in range(0, len(questions), ASKED_AT_ONCE):
            chosen = [self.choose(one, mode, filters) for one in questions[first : first + ASKED_AT_ONCE]]
            answers: dict[int, Answer] = {}
            for batch in prompt_batches([one.prompt for one in chosen], batch_size):
                written = self.write([chosen[index] for index in batch], mode, on_text)
                answers.update(zip(batch, written if has_details else map(brief, written), strict=True))
            found += [answers[index] for index in range(len(chosen))]
        return found

    def choose(self, question: str, mode: Mode, filters: Filters | None) -> Chosen:
        """Find and weigh passages for a question; where none is mounted their order is all that counts."""
        timer = Timer()
        hits = self.retrieve(question, filters, timer, n_best=0 if mode == "rag" else self.retrieval.top_k)
        mounted = self.weigh(hits)
        read = self.read(mounted, mode)
        return Chosen(question, hits, mounted, len(read), prompt_of(question, read), timer)

    def write(self, chosen: Sequence[Chosen], mode: Mode, on_text: Callable[[str], None] | None) -> list[Answer]:
        """Answer B questions in one generation."""
        from knowstore.experts import generate

        timer = Timer()
        with timer.stage("load models"):
            llm = self.models.llm
            layer = self.models.hypernetwork_config["layer"]
        with timer.stage("experts"):
            experts = self.experts([one.mounted for one in chosen], mode)
        with timer.stage("generate"):
            generated = generate(llm, [one.prompt for one in chosen], experts, layer, self.generation, on_text=on_text)
        return [
            Answer(
                one.question, written.text, mode, tuple(one.mounted), tuple(one.hits),
                _seconds(one.timer, timer, written.first_token_s), is_null=not one.mounted,
                notes=_notes(written, experts if one.mounted else None), n_read=one.n_read,
            )
            for one, written in zip(chosen, generated, strict=True)
        ]  # fmt: skip


def brief(answer: Answer) -> Answer:
    """The answer without what was found for it, and its experts by id, weight, score and origin alone."""
    experts = [replace(one, text="", segments=(), segment_weights=(), word_weights=()) for one in answer.experts]
    return replace(answer, hits=(), experts=tuple(experts))


def prompt_of(question: str, passages: Sequence[Passage | MountedExpert]) -> Prompt:
    """The prompt that asks a question, behind passages that are read if there are any."""
    from knowstore.experts import Prompt

    before = passages_prompt([(one.title, one.text) for one in passages]) if passages else ""
    return Prompt(before, question_prompt(question))


def weigh(hits: Sequence[Hit], retrieval: RetrievalConfig, reranker: Reranker) -> list[MountedExpert]:
    """Eq. 9 over the best `top_k` hits without a newer twin, in each over its sentences and words; empty when the null
    option won."""
    kept = [hit for hit in hits if hit.newer_twin is None][: retrieval.top_k]
    threshold = reranker.null_threshold if retrieval.null_threshold == "auto" else retrieval.null_threshold
    if not kept or (threshold is not None and kept[0].score < threshold):
        return []
    weights = relevance([hit.score for hit in kept], retrieval.temperature)
    shares = [
        [weight * share for share in relevance(hit.segment_scores, retrieval.temperature)]
        for hit, weight in zip(kept, weights, strict=True)
    ]
    return [
        MountedExpert(
            hit.passage_id, weight, hit.score, hit.batch_id, hit.source, hit.title, hit.text, hit.segments, tuple(some),
            word_relevance(hit.word_scores, hit.segments, some, retrieval.temperature)
            if retrieval.grain == "words" and some else (),
        )
        for hit, weight, some in zip(kept, weights, shares, strict=True)
    ]  # fmt: skip


def combine_weighed(
    questions: Sequence[Sequence[MountedExpert]],
    read: Callable[[Sequence[str]], Mapping[str, StoredExpert]],
    models: LoadedModels,
    grain: Grain,
) -> Experts:
    """What is mounted for B questions: each expert as its passage was weighed (`weigh`).

    Where words were told apart, experts of passages of next to no relevance are not read, and of an expert whose
    neurons are weighed one by one those alone are made that weigh something.

    Args:
        read: gives the experts of passages by their ids.
    """
    from knowstore.experts import combine, heaviest

    questions = [_worth_reading(mounted) for mounted in questions]
    stored = read(list(dict.fromkeys(one.passage_id for mounted in questions for one in mounted)))

    def weights_of(one: MountedExpert) -> list[float] | None:
        passage, ranks = (one.title, one.text, one.segments), stored[one.passage_id].segment_ranks
        if grain == "passages":
            return None
        return models.neuron_weights(ranks, passage, one.segment_weights, one.word_weights)

    weights = [[weights_of(one) for one in mounted] for mounted in questions]
    kept: dict[str, list[int] | None] = {}  # for any of the questions, of which each has its own
    for mounted, given in zip(questions, weights, strict=True):
        for place, (one, some) in enumerate(zip(mounted, heaviest(given), strict=True)):
            before, whole = kept.get(one.passage_id, []), given[place]
            kept[one.passage_id] = None if some is None or before is None else sorted({*before, *some})
            if some is not None and whole is not None:
                own = set(some)
                given[place] = [weight if index in own else 0.0 for index, weight in enumerate(whole)]
    made = models.mountable([stored[passage_id] for passage_id in kept], list(kept.values()))
    experts = dict(zip(kept, made, strict=True))

    def mountable(one: MountedExpert, given: Sequence[float] | None) -> Mountable:
        neurons = kept[one.passage_id]
        some = given if given is None or neurons is None else [given[index] for index in neurons]
        return experts[one.passage_id], one.weight, some

    return combine(
        [list(map(mountable, mounted, given)) for mounted, given in zip(questions, weights, strict=True)],
        device=models.llm.device,
        dtype=models.llm.dtype,
        static=models.hypernetwork.static,
        query=models.query,
        max_norm=models.hypernetwork.config.max_norm,
    )


def _worth_reading(mounted: Sequence[MountedExpert]) -> Sequence[MountedExpert]:
    """Where words were told apart, the passages of a question that are of more than next to no relevance."""
    if not any(one.word_weights for one in mounted):
        return mounted
    least = _LEAST_RELEVANCE * max(one.weight for one in mounted)
    return [one for one in mounted if one.weight >= least]


def scored_hit(
    passage_id: str, item: RerankItem, score: RerankScore, batch_id: int = 0, newer_twin: str | None = None
) -> Hit:
    """A passage that was chosen without a search, as `retrieve` would give it."""
    return Hit(
        passage_id, item.title, item.text, "", "", batch_id, item.retrieval_score, score.score, tuple(item.spans),
        score.segment_scores, score.word_scores, newer_twin,
    )  # fmt: skip


def twins(question: str, passages: Sequence[tuple[str, str]], overlap: float) -> list[tuple[int, int]]:
    """Pairs of passages, given as (title, text), that have one title and share at least `overlap` of their words
    (Jaccard), or are statements that differ in what they end with or put in one place: what contradicts an older text
    mostly repeats it.

    Texts of one pattern do so as well. Those of which the question names one, by a name or a number that the other has
    not, are about other things and no twins.
    """
    asked = frozenset(_WORD.findall(question.casefold()))
    words = [frozenset(text.lower().split()) for _, text in passages]
    statements = [_statement(text) for _, text in passages]
    pairs = [
        (one, other)
        for one, other in combinations(range(len(passages)), 2)
        if passages[one][0] == passages[other][0]
        and (
            len(words[one] & words[other]) >= overlap * len(words[one] | words[other])
            or _differ_in_one_place(statements[one], statements[other], asked)
        )
    ]
    return [(one, other) for one, other in pairs if not asked & _names_of_one(passages[one][1], passages[other][1])]


def _statement(text: str) -> list[str]:
    """The words of a text that is short enough to say one thing, but for its numbers, such as dates; else none."""
    if len(text) > 20 * _STATEMENT:
        return []
    words = [word for word in _WORD.findall(text.casefold()) if not word.isdigit()]
    return words if len(words) <= _STATEMENT else []


def _differ_in_one_place(words: Sequence[str], others: Sequence[str], asked: frozenset[str]) -> bool:
    """Whether two statements are one but for some words in one place, none of which the question has."""
    shortest = min(len(words), len(others))
    before = _n_alike(words, others)
    after = min(_n_alike(words[::-1], others[::-1]), shortest - before)
    shared = {*words[:before], *words[len(words) - after :]}
    return before + after >= max(_ALIKE, shortest / 2) and not asked & ({*words, *others} - shared)


def _n_alike(words: Sequence[str], others: Sequence[str]) -> int:
    """How many words two texts begin with alike."""
    differ = (n for n, (word, other) in enumerate(zip(words, others, strict=False)) if word != other)
    return next(differ, min(len(words), len(others)))


def _names_of_one(text: str, other: str) -> set[str]:
    """The names and numbers of either text that are no words of the other, in small letters."""
    found = [_WORD.findall(some) for some in (text, other)]
    folded = [{word.casefold() for word in some} for some in found]
    return {
        word.casefold()
        for some, others in zip(found, reversed(folded), strict=True)
        for word in some
        if (word[0].isupper() or word[0].isdigit()) and word.casefold() not in others
    }


def superseded(pairs: Sequence[tuple[str, str]], since: Mapping[str, int]) -> dict[str, str]:
    """Of pairs of twins each that is older, by the edit batch that brought it, with the newer one."""
    newer: dict[str, str] = {}
    for pair in pairs:
        older, twin = sorted(pair, key=since.__getitem__)
        if since[older] != since[twin]:
            newer[older] = twin
    return newer


@dataclass(frozen=True)
class Chosen:
    """A question with what was found for it, and the seconds that this took."""

    question: str
    hits: list[Hit]
    mounted: list[MountedExpert]
    n_read: int
    prompt: Prompt
    timer: Timer


def prompt_batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts, at most `batch_size` at a time, longest first, so that the prompts of a batch need little
    padding and take bounded memory."""
    batch: list[int] = []
    lengths = [len(prompt.before) + len(prompt.question) for prompt in prompts]
    for index in sorted(range(len(prompts)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[batch[0]] > _BATCH_CHARACTERS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _seconds(choosing: Timer, writing: Timer, first_token_s: float) -> dict[str, float]:
    """Seconds by stage and in all; those of writing are of the whole batch."""
    stages = choosing.seconds | writing.seconds
    seconds = {name.replace(" ", "_"): value for name, value in stages.items()}
    seconds["total"] = sum(stages.values())
    return seconds | ({"first_token": first_token_s} if first_token_s else {})


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
                f"experts of this batch of questions would have added {largest:.3g} where {experts.max_norm:.3g} is "
                "the bound, and were held to it: run `knowstore verify`"
            )
    return tuple(notes)


@contextmanager
def mounted_llm(models: LoadedModels, experts: Experts | None) -> Iterator[FrozenLLM]:
    """The LLM with experts on, for any number of sequences; nothing is on after the block."""
    from knowstore.experts import mount

    if experts is None:
        yield models.llm
        return
    with mount(models.llm.model, experts, models.hypernetwork.config.layer):
        yield models.llm


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
