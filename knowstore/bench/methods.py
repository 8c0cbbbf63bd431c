"""Methods that teach a frozen LLM, side by side: the same edits, the same questions, the same decoding (Table 1).

Answers are generated greedily until the model stops, as in `run_controls`. A method answers alone, and with the passage
in the prompt. In the setting `single` each row's edits are taught to the untouched model and taken back, in
`sequential` all rows' edits are taught one after another before anything is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from knowstore._loaded import LoadedModels, OnProgress
from knowstore.baselines import EditRow, Method
from knowstore.bench.memory import PeakMemory
from knowstore.bench.scoring import scored, share
from knowstore.bench.teaching import AskedCases, TaughtCase, cases_of, ready_methods, usable_names, ways_of
from knowstore.config import GenerationConfig, ModelConfig
from knowstore.evaluation import normalise

Setting = Literal["single", "sequential"]
OnFound = Callable[[dict[str, object]], None]

_BATCH = 16


@dataclass(frozen=True)
class _Answered:
    case: TaughtCase
    text: str
    forced: float
    is_rag: bool


@dataclass
class _Cost:
    """What a method took in a setting: seconds in all, kept bytes in all."""

    injection_s: float = 0.0
    answer_s: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    kept_bytes: int = 0


def run_methods(
    data: Sequence[Path],
    *,
    methods: Sequence[str] = (),
    corpus: Sequence[Path] = (),
    train: Sequence[Path] = (),
    models: ModelConfig | None = None,
    is_sequential: bool = False,
    limit: int = 100,
    seed: int = 0,
    max_tokens: int = 32,
    n_steps: int = 500,
    cache_dir: Path | None = None,
    on_progress: OnProgress | None = None,
    on_found: OnFound | None = None,
) -> dict[str, object]:
    """Teach the edits of some files by each method and ask what their probes ask.

    Args:
        data: edit sets, or questions on passages, as `load_edits` reads them.
        methods: names out of `baselines.METHODS`; when empty, all that lack nothing (`baselines.usable_methods`).
        corpus: passages `{title, text}`, for methods that need usual text.
        train: edit sets for methods that train a network; rows that share a question with `data` are left out.
        models: a `dtype` of `auto` means float32 here, for small changes of weights are lost in bfloat16.
        is_sequential: teach everything before asking, in place of one row at a time.
        limit: rows of each file, drawn with `seed`.
        n_steps: train the networks of MEND and MALMEN.
        on_found: called with what was found so far each time that a method is done with a file.
        cache_dir: where prepared statistics are kept; None is the user's cache.

    Returns: `rows` of {data, method, setting, kind, n, em, em_ci, f1, f1_ci, forced, forced_ci, unchanged,
        unchanged_ci}, scores from 0 to 1 with bootstrap 95 % intervals, a method with the passage in the prompt being
        `METHOD + rag`, `forced` the teacher-forced score of the first accepted answer (`experts.forced_scores`), and
        `unchanged` the share of answers that are those of the untouched model; `costs` of {data, method, setting,
        passages, prepare_s, injection_s_per_passage, answer_s, answer_s_rag, peak_bytes, kept_bytes_per_passage},
        `answer_s` a question; `answers` of {data, method, setting, kind, question, accepted, answer}; and `seconds`.

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: no rows, or a method that is not there or lacks what it needs.
    """
    started = time.perf_counter()
    names = methods or usable_names(corpus, train)
    ready = ready_methods(
        data, names, corpus=corpus, train=train, models=models, limit=limit, seed=seed, n_steps=n_steps,
        cache_dir=cache_dir,
        on_progress=on_progress,
    )  # fmt: skip
    setting: Setting = "sequential" if is_sequential else "single"
    bench = _Bench(ready.models, setting, seed, GenerationConfig(max_tokens=max_tokens))

    def found() -> dict[str, object]:
        seconds = time.perf_counter() - started
        return {"rows": bench.rows, "costs": bench.costs, "answers": bench.answers, "seconds": seconds}

    for name, rows in ready.sets:
        for step, (method, prepare_s) in enumerate(ready.methods):
            bench.measure(name, rows, method, prepare_s, _Steps(name, len(rows), step, len(ready.methods), on_progress))
            if on_found is not None:
                on_found(found())
    return found()


@dataclass(frozen=True)
class _Steps:
    """Progress through the rows of one data set, over all methods."""

    name: str
    n_rows: int
    method: int
    n_methods: int
    on_progress: OnProgress | None

    def done(self, n: int) -> None:
        if self.on_progress is not None:
            self.on_progress(self.name, self.method * self.n_rows + n, self.n_methods * self.n_rows)


class _Bench:
    def __init__(self, models: LoadedModels, setting: Setting, seed: int, generation: GenerationConfig) -> None:
        self.models, self.setting, self.seed, self.generation = models, setting, seed, generation
        self.untouched: dict[tuple[str, str], str] = {}
        self.rows: list[dict[str, object]] = []
        self.costs: list[dict[str, object]] = []
        self.answers: list[dict[str, object]] = []

    def measure(self, data: str, rows: Sequence[EditRow], method: Method, prepare_s: float, steps: _Steps) -> None:
        """Teach and ask, and note scores, costs and answers."""
        cost = _Cost()
        with PeakMemory(self.models.device) as peak:
            answered = list(self._sequence(rows, method, cost, steps))
        if method.name == "base":
            self.untouched |= {(data, one.case.probe.question): one.text for one in answered}
        for is_rag in (False, True):
            some = [one for one in answered if one.is_rag == is_rag]
            name = f"{method.name} + rag" if is_rag and False in ways_of(method) else method.name
            self._note(data, name, some)
        n_passages = sum(len(row.edits) for row in rows)
        n_asked = sum(len(row.probes) for row in rows)
        self.costs.append(
            {
                "data": data,
                "method": method.name,
                "setting": self.setting,
                "passages": n_passages,
                "prepare_s": prepare_s,
                "injection_s_per_passage": cost.injection_s / n_passages,
                "answer_s": cost.answer_s[False] / n_asked if False in ways_of(method) else None,
                "answer_s_rag": cost.answer_s[True] / n_asked if True in ways_of(method) else None,
                "peak_bytes": peak.bytes,
                "kept_bytes_per_passage": cost.kept_bytes / n_passages,
            }
        )

    def _sequence(self, rows: Sequence[EditRow], method: Method, cost: _Cost, steps: _Steps) -> Iterator[_Answered]:
        """Answers to all probes, in the setting's order of teaching and asking."""
        groups = [[place] for place in range(len(rows))] if self.setting == "single" else [list(range(len(rows)))]
        for group in groups:
            edits = [edit for place in group for edit in rows[place].edits]
            with method.teaching(self.models.llm) as teach:
                edited = teach(edits)
                cost.injection_s += edited.seconds
                cost.kept_bytes += edited.kept_bytes
                cases = cases_of(rows, group)
                for first in range(0, len(cases), _BATCH):
                    part = cases[first : first + _BATCH]
                    for is_rag in ways_of(method):
                        started = time.perf_counter()
                        asked = AskedCases.of(edited, part, is_rag=is_rag)
                        texts = asked.write(self.models.llm, self.generation)
                        cost.answer_s[is_rag] += time.perf_counter() - started
                        forced = asked.force(self.models.llm, self.generation)
                        for case, text, score in zip(part, texts, forced, strict=True):
                            yield _Answered(case, text, score, is_rag)
                    steps.done(part[-1].row + 1)

    def _note(self, data: str, method: str, answered: Sequence[_Answered]) -> None:
        """Scores of each kind of probe, and the answers themselves."""
        for kind in dict.fromkeys(one.case.probe.kind for one in answered):
            some = [one for one in answered if one.case.probe.kind == kind]
            shared: dict[str, object] = {"data": data, "method": method, "setting": self.setting, "kind": kind}
            scores = scored([one.text for one in some], [one.case.probe.answers for one in some], self.seed)
            same = [float(self._is_unchanged(data, one)) for one in some]
            forced = share("forced", [one.forced for one in some], self.seed)
            self.rows.append(shared | scores | forced | share("unchanged", same, self.seed))
            self.answers += [
                shared
                | {"question": one.case.probe.question, "accepted": list(one.case.probe.answers), "answer": one.text}
                for one in some
            ]

    def _is_unchanged(self, data: str, one: _Answered) -> bool:
        return normalise(self.untouched[data, one.case.probe.question]) == normalise(one.text)
