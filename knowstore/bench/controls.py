"""What an expert carries: the same questions with no expert, the static one, another passage's, and their own.

The gain that counts is gold minus shuffled: what the passage itself added. The other controls tell it from the answer
format that every expert teaches.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from knowstore._answering import combine_weighed, prompt_of, scored_hit, weigh
from knowstore._loaded import LoadedModels, OnProgress
from knowstore.bank import StoredExpert
from knowstore.bench.corpus import names_of
from knowstore.bench.made import MadeExperts
from knowstore.bench.scoring import scored, share
from knowstore.config import GenerationConfig, Grain, ModelConfig, RetrievalConfig
from knowstore.errors import ConfigError
from knowstore.records import Hit, MountedExpert, Passage
from knowstore.retrieval import RerankItem
from knowstore.sources import sentence_spans
from knowstore.training import read_rows

if TYPE_CHECKING:
    from knowstore.experts import Experts, Prompt

_BATCH = 20


@dataclass(frozen=True)
class Case:
    """A question with its passage, and the characters of the passage's sentences."""

    question: str
    answers: tuple[str, ...]
    passage: Passage
    spans: tuple[tuple[int, int], ...]

    @property
    def gold_segment(self) -> int | None:
        """The first sentence that holds an accepted answer."""
        for position, (first, last) in enumerate(self.spans):
            if any(answer in self.passage.text[first:last] for answer in self.answers):
                return position
        return None


def run_controls(
    data: Sequence[Path],
    *,
    methods: Sequence[str] = (),
    models: ModelConfig | None = None,
    limit: int = 200,
    seed: int = 0,
    max_tokens: int = 32,
    is_counterfactual: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, object]:
    """Ask the questions of QA files under each control, greedily, and score the answers.

    Methods: the hypernetwork's kind with its words weighed by the reranker, as `ask` does by default; of a kind that
    has segments also `KIND, sentences` and `KIND, passages`, weighed at coarser grains, and `KIND, sentence known`,
    with the sentence that holds the answer known, on the questions that have one; `rag`, the passage in the prompt and
    no expert; and with a reader for this LLM `rag, tuned`, the reader in the place of the static expert, and `hybrid`,
    the passage's expert as well.

    Args:
        data: files in the QA row format, `.jsonl` or `.jsonl.gz`.
        methods: those that are measured; all when empty.
        limit: questions of each file, drawn with `seed`.
        is_counterfactual: take rows with a `counterfactual_text`, give that as the passage, and accept the
            `counterfactual_answer` alone: does the answer follow a passage that contradicts the model?

    Returns: `rows` of {data, method, control, n, em, em_ci, f1, f1_ci, forced, forced_ci}, scores from 0 to 1 with
        bootstrap 95 % intervals, and `seconds`. `em` and `f1` are of what the model writes alone, `forced` is the
        teacher-forced score of the first accepted answer (`experts.forced_scores`).

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: fewer than two questions, or a method that these models do not have.
    """
    started = time.perf_counter()
    benches = open_benches(
        data, models, limit, seed, max_tokens, on_progress, is_counterfactual=is_counterfactual, methods=methods
    )
    rows = [row for bench in benches for row in bench.rows(methods)]
    if not rows:
        raise ConfigError(
            f"no passage of these files has sentences for {'; '.join(methods)}",
            kept="nothing was measured", fix="give longer passages, or name other methods",
        )  # fmt: skip
    return {"rows": rows, "seconds": time.perf_counter() - started}


def open_benches(
    data: Sequence[Path],
    models: ModelConfig | None,
    limit: int,
    seed: int,
    max_tokens: int,
    on_progress: OnProgress | None,
    *,
    is_counterfactual: bool = False,
    methods: Sequence[str] = (),
) -> Iterator[ControlBench]:
    """The questions of each file, ready to be asked; arguments and errors as for `run_controls`."""
    loaded = LoadedModels(models or ModelConfig(), on_progress=on_progress)
    loaded.check_trained()
    _check_methods(methods, loaded)
    generation = GenerationConfig(max_tokens=max_tokens)
    for path, name in zip(data, names_of(data), strict=True):
        cases = read_cases(path, limit, seed, is_counterfactual=is_counterfactual)
        yield ControlBench(loaded, name, cases, seed, generation, on_progress)


def read_cases(path: Path, limit: int | None, seed: int, *, is_counterfactual: bool = False) -> list[Case]:
    """Up to `limit` questions of a file, or all, drawn with `seed`; arguments and errors as for `run_controls`."""
    found = [
        (row["question"], tuple(answers), Passage(text, row["passage"]["title"]))
        for row in read_rows(path)
        if "passage" in row
        for text, answers in [
            (row.get("counterfactual_text"), [row.get("counterfactual_answer")])
            if is_counterfactual
            else (row["passage"]["text"], row["answers"])
        ]
        if text and answers
    ]
    random.Random(seed).shuffle(found)
    cases = [
        Case(question, answers, passage, tuple(sentence_spans(passage.text)))
        for question, answers, passage in found[:limit]
    ]
    if len(cases) < 2:
        raise ConfigError(
            f"{path} has {len(cases)} questions with a passage, controls need two",
            kept="nothing was measured",
            fix="give a file in the QA row format: question, answers, passage: {title, text}"
            + (", counterfactual_text, counterfactual_answer" if is_counterfactual else ""),
        )
    return cases


class ControlBench:
    """Questions with their passages, and what is needed to answer them under each control."""

    def __init__(
        self,
        models: LoadedModels,
        name: str,
        cases: Sequence[Case],
        seed: int,
        generation: GenerationConfig,
        on_progress: OnProgress | None,
    ) -> None:
        self.models, self.name, self.cases, self.seed = models, name, cases, seed
        self.generation, self.on_progress = generation, on_progress
        self.made = MadeExperts.make(models, [case.passage for case in cases])
        self.stored: Sequence[StoredExpert] = self.made.latents
        self.vectors = models.retriever.encode_passages([c.passage for c in cases], [c.spans for c in cases])
        self.questions = models.retriever.encode_questions([case.question for case in cases])
        self.others = _others(cases)
        self.hits: dict[tuple[int, int], Hit] = {}
        self.grains = _grains(models)
        if all(len(expert.segment_ranks) <= 1 for expert in self.stored):
            kind = models.hypernetwork.config.kind
            self.grains = {kind: self.grains[kind]}

    def rows(self, methods: Sequence[str] = ()) -> list[dict[str, object]]:
        """Scores of each method, or of those named that these passages have, under its controls."""
        everything = list(range(len(self.cases)))
        known = [index for index in everything if self.cases[index].gold_segment is not None]
        kind = self.models.hypernetwork.config.kind
        runs: list[tuple[str, str, list[int], list[int | None] | None, bool]] = [
            ("base", "none", everything, None, False),
            ("rag", "gold", everything, list(everything), False),
            ("rag", "shuffled", everything, [self.others[i] for i in everything], False),
            (kind, "static", everything, None, True),
        ]
        if self.models.reader is not None:
            for method in ("rag, tuned", "hybrid"):
                runs.append((method, "shuffled", everything, [self.others[i] for i in everything], False))
                runs.append((method, "gold", everything, list(everything), False))
        for method, grain in self.grains.items():
            asked = known if grain == "known" else everything
            runs.append((method, "shuffled", asked, [self.others[i] for i in asked], False))
            runs.append((method, "gold", asked, list(asked), False))
        runs = [run for run in runs if not methods or run[0] in methods]
        out = []
        for step, (method, control, indices, passages, is_static) in enumerate(runs):
            if self.on_progress is not None:
                self.on_progress(f"{self.name}: {method}, {control}", step, len(runs))
            if indices:
                out.append(self._row(method, control, indices, passages, is_static))
        return out

    def answers(
        self, method: str, indices: list[int], passages: list[int | None] | None, is_static: bool = False
    ) -> list[str]:
        """What the model says to the questions `indices`, by a method of `rows`, with these passages or none."""
        from knowstore.experts import generate

        llm, layer = self.models.llm, self.models.hypernetwork.config.layer
        texts: list[str] = []
        for _, prompts, experts in self._asked(method, indices, passages, is_static):
            texts += [one.text for one in generate(llm, prompts, experts, layer, self.generation)]
        return texts

    def _asked(
        self, method: str, indices: list[int], passages: list[int | None] | None, is_static: bool
    ) -> Iterator[tuple[list[int], list[Prompt], Experts | None]]:
        """Batches of the questions `indices`, each with its prompts and what is mounted."""
        network = self.models.hypernetwork
        for first in range(0, len(indices), _BATCH):
            part = indices[first : first + _BATCH]
            chosen = None if passages is None else passages[first : first + _BATCH]
            experts: Experts | None = None
            read: list[list[Passage]] = [[] for _ in part]
            if is_static and network.static is not None:
                experts = replace(network.static_experts(self.models.llm), query=self.models.query)
            elif chosen is not None:
                given = [index for index in chosen if index is not None]
                if method.startswith(("rag", "hybrid")):
                    read = [[self.cases[index].passage] for index in given]
                experts = self._experts(part, given, method)
            yield part, [prompt_of(self.cases[i].question, some) for i, some in zip(part, read, strict=True)], experts

    def _experts(self, questions: list[int], passages: list[int], method: str) -> Experts | None:
        tuned = self.models.reader_experts
        if tuned is None or method not in ("rag, tuned", "hybrid"):
            return None if method == "rag" else self.mounted(questions, passages, self.grains[method])
        if method == "rag, tuned":
            return tuned
        mounted = self.mounted(questions, passages)
        return replace(mounted, static=tuned.static, query=tuned.query)

    def mounted(
        self, questions: Sequence[int], passages: Sequence[int], grain: Grain | Literal["known"] | None = None
    ) -> Experts:
        """What is mounted for questions, each with one passage's expert, weighed as `ask` does or at another grain."""
        grain = RetrievalConfig().grain if grain is None else grain
        weighed = [
            [self._weighed(question, passage, grain)] for question, passage in zip(questions, passages, strict=True)
        ]
        stored = {self.cases[passage].passage.passage_id: self.stored[passage] for passage in passages}
        return combine_weighed(weighed, lambda _: stored, self.models, "sentences" if grain == "known" else grain)

    def _weighed(self, question: int, passage: int, grain: Grain | Literal["known"]) -> MountedExpert:
        """A passage as the reranker weighs it, or with the sentence known."""
        retrieval = RetrievalConfig(null_threshold=None, grain="sentences" if grain == "known" else grain)
        [weighed] = weigh([self._hit(question, passage)], retrieval, self.models.reranker)
        if grain != "known":
            return weighed
        case = self.cases[passage]
        known = tuple(float(position == (case.gold_segment or 0)) for position in range(len(case.spans)))
        return replace(weighed, segment_weights=known)

    def _hit(self, question: int, passage: int) -> Hit:
        """The passage with the reranker's scores, once for all methods."""
        if (question, passage) not in self.hits:
            case, (vector, segment_vectors) = self.cases[passage], self.vectors[passage]
            item = RerankItem(case.passage.title, case.passage.text, case.spans, vector, segment_vectors)
            [score] = self.models.reranker.score(self.cases[question].question, [item], self.questions[question])
            self.hits[question, passage] = scored_hit(case.passage.passage_id, item, score)
        return self.hits[question, passage]

    def _row(
        self, method: str, control: str, indices: list[int], passages: list[int | None] | None, is_static: bool
    ) -> dict[str, object]:
        """Scores of the answers of a method under a control, and of the first accepted ones."""
        from knowstore.experts import forced_scores, generate

        llm, layer = self.models.llm, self.models.hypernetwork.config.layer
        texts: list[str] = []
        forced: list[float] = []
        for part, prompts, experts in self._asked(method, indices, passages, is_static):
            texts += [one.text for one in generate(llm, prompts, experts, layer, self.generation)]
            firsts = [self.cases[index].answers[0] for index in part]
            forced += forced_scores(llm, prompts, firsts, experts, layer, self.generation)
        scores = scored(texts, [self.cases[i].answers for i in indices], self.seed)
        described = {"data": self.name, "method": method, "control": control}
        return described | scores | share("forced", forced, self.seed)


def _grains(models: LoadedModels) -> dict[str, Grain | Literal["known"]]:
    """The hypernetwork's methods, and how each weighs a passage: the first as `ask` does."""
    kind, served = models.hypernetwork.config.kind, RetrievalConfig().grain
    others: dict[str, Grain | Literal["known"]] = {
        f"{kind}, {grain}": grain for grain in get_args(Grain) if grain != served
    }
    return {kind: served, **others, f"{kind}, sentence known": "known"}


def _check_methods(methods: Sequence[str], models: LoadedModels) -> None:
    """Refuse names that no file could have rows of."""
    there = ["base", "rag", *(("rag, tuned", "hybrid") if models.reader is not None else ()), *_grains(models)]
    if unknown := [name for name in methods if name not in there]:
        raise ConfigError(
            f"there is no method {unknown[0]!r} with these models",
            kept="nothing was measured", fix=f"name some of: {'; '.join(there)}",
        )  # fmt: skip


def _others(cases: Sequence[Case]) -> list[int]:
    """For each question another question's passage, never its own text."""
    n = len(cases)
    out = []
    for index, case in enumerate(cases):
        shifts = ((index + n // 2 + step) % n for step in range(n))
        out.append(next((i for i in shifts if cases[i].passage.text != case.passage.text), (index + 1) % n))
    return out
