"""Methods over one sequence of edit batches: what each still knows of every batch, as far as it survives them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from knowstore._loaded import LoadedModels, OnProgress
from knowstore.baselines import Edited, EditRow, Method
from knowstore.bench.scoring import share
from knowstore.bench.teaching import AskedCases, TaughtCase, cases_of, ready_methods, usable_names, ways_of
from knowstore.config import GenerationConfig, ModelConfig
from knowstore.errors import ConfigError
from knowstore.evaluation import (
    average_score,
    backward_transfer,
    bootstrap_interval,
    exact_match,
    forgetting_matrix,
    token_f1,
)

_BATCH = 16
_KNOWN = ("rag", "experts")  # are told which passage answers, which cannot be forgotten
_MOST_LOST = math.log(2)  # nats: a token is half as likely


@dataclass(frozen=True)
class SequenceConfig:
    """`n_batches` edit batches of `n_rows` rows, drawn with `seed`; answers of at most `max_tokens`; `n_steps` of
    training for the networks of MEND and MALMEN."""

    n_batches: int = 6
    n_rows: int = 10
    seed: int = 0
    max_tokens: int = 32
    n_steps: int = 500

    def __post_init__(self) -> None:
        if min(self.n_batches, self.n_rows, self.max_tokens, self.n_steps) < 1:
            raise ConfigError(
                f"{self.n_batches} batches of {self.n_rows} rows, {self.max_tokens} tokens, {self.n_steps} steps",
                kept="nothing was measured",
                fix="use at least 1 of each",
            )


def run_sequence(
    data: Path,
    *,
    config: SequenceConfig | None = None,
    methods: Sequence[str] = (),
    corpus: Sequence[Path] = (),
    train: Sequence[Path] = (),
    models: ModelConfig | None = None,
    cache_dir: Path | None = None,
    on_progress: OnProgress | None = None,
    on_found: Callable[[dict[str, object]], None] | None = None,
) -> dict[str, object]:
    """Teach the same edit batches by each method and ask, after every one, what it and all earlier ones taught.

    Experts and passages are looked for among everything that was taught so far, as `ask` does. A method survives a
    batch when both of these hold, and is taught no more after the first that it does not:

    - it knows: over all questions so far its F1 is above that of the untouched model, the lower end of the paired
      bootstrap 95 % interval of the difference included;
    - it speaks: of what the edits must leave alone (the neighbourhood of all rows) a right token is on the geometric
      mean at least half as likely as for the untouched model.

    Args:
        data: an edit set, or questions on passages, as `load_edits` reads them.
        methods: names out of `baselines.METHODS`; when empty, those that lack nothing, but for `rag` and `experts`,
            which are told the passage.
        corpus, train, models, cache_dir: as for `run_methods`.
        on_found: called with what was found so far each time that a method is done.

    Returns: `rows` of {data, method, after, n, em, em_ci, f1, f1_ci, gain, gain_ci, unrelated, injection_s, survives},
        one for each method and batch, scores from 0 to 1 over all questions so far, `gain` F1 minus that of the
        untouched model, `unrelated` nats per token of the neighbourhood's answers; `methods` of {method, survived, why,
        matrix, matrix_f1, matrix_n, average, bwt, bwt_f1}, `survived` a number of batches, `why` empty for all of them,
        `matrix[t][i]` EM on batch i after batch t; `batches`, `edits_per_batch` and `seconds`.

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: fewer rows than the batches need, or a method that is not there or lacks what it needs.
    """
    started = time.perf_counter()
    config = config or SequenceConfig()
    names = methods or [name for name in usable_names(corpus, train) if name not in _KNOWN]
    ready = ready_methods(
        [data], names, corpus=corpus, train=train, models=models, limit=config.n_batches * config.n_rows,
        seed=config.seed, cache_dir=cache_dir, n_steps=config.n_steps, on_progress=on_progress,
    )  # fmt: skip
    [(name, rows)] = ready.sets
    if len(rows) < config.n_batches * config.n_rows:
        raise ConfigError(
            f"{name} has {len(rows)} edits, too few for {config.n_batches} batches of {config.n_rows}",
            kept="nothing was measured",
            fix="give a larger file, or use fewer batches or edits",
        )
    bench = _Bench(ready.models, name, rows, config)
    found: dict[str, object] = {}
    for step, (method, _) in enumerate(ready.methods):
        if step:
            bench.measure(method)
        else:
            bench.measure_untouched(method)
        found = {
            "rows": bench.rows, "methods": bench.methods, "batches": config.n_batches,
            "edits_per_batch": config.n_rows, "seconds": time.perf_counter() - started,
        }  # fmt: skip
        if on_progress is not None:
            on_progress(f"{name}: {method.name}", step + 1, len(ready.methods))
        if on_found is not None:
            on_found(found)
    return found


def why_lost(gain_low: float, unrelated: float | None, untouched: float | None) -> str:
    """Why a method does not survive, empty where it does.

    Args:
        gain_low: the lower end of the interval of F1 minus that of the untouched model.
        unrelated, untouched: nats per token of what must be left alone, of the method and of the untouched model.
    """
    if gain_low <= 0:
        return "it knows no more than the untouched model"
    if unrelated is not None and untouched is not None and not unrelated <= untouched + _MOST_LOST:
        return "it has lost what was to be left alone"
    return ""


Scored = tuple[int, int, float]  # after which batch it was asked, the batch that taught it, its score


class _Bench:
    def __init__(self, models: LoadedModels, data: str, rows: Sequence[EditRow], config: SequenceConfig) -> None:
        self.models, self.data, self.edits, self.config = models, data, rows, config
        self.generation = GenerationConfig(max_tokens=config.max_tokens)
        cases = cases_of(rows, range(len(rows)))
        self.facts = [case for case in cases if case.probe.kind != "neighbourhood"]  # in the order of teaching
        self.others = [case for case in cases if case.probe.kind == "neighbourhood"]
        self.untouched_f1: list[float] = []
        self.untouched: float | None = None
        self.rows: list[dict[str, object]] = []
        self.methods: list[dict[str, object]] = []

    def measure_untouched(self, method: Method) -> None:
        """Ask the untouched model everything once, which is what every method is compared with."""
        with method.teaching(self.models.llm) as teach:
            edited = teach([])
            texts = self._write(method, edited, self.facts)
            self.untouched = self._unrelated(method, edited, 0)
        em, self.untouched_f1 = self._scores(texts)
        reached = range(1, self.config.n_batches + 1)
        self.rows += [self._row(method.name, after, em, self.untouched_f1, self.untouched) for after in reached]

    def measure(self, method: Method) -> None:
        """Let a method live through the batches as far as it survives them."""
        scored_em: list[Scored] = []
        scored_f1: list[Scored] = []
        survived, why, n = 0, "", self.config.n_rows
        with method.teaching(self.models.llm) as teach:
            for after in range(1, self.config.n_batches + 1):
                edited = teach([edit for row in self.edits[(after - 1) * n : after * n] for edit in row.edits])
                em, f1 = self._scores(self._write(method, edited, self.facts[: self._n_asked(after)]))
                scored_em += [(after, self._batch(case), score) for case, score in zip(self.facts, em, strict=False)]
                scored_f1 += [(after, self._batch(case), score) for case, score in zip(self.facts, f1, strict=False)]
                unrelated = self._unrelated(method, edited, after)
                row = self._row(method.name, after, em, f1, unrelated)
                gains = [one - other for one, other in zip(f1, self.untouched_f1, strict=False)]
                row |= share("gain", gains, self.config.seed)
                why = why_lost(bootstrap_interval(gains, seed=self.config.seed)[0], unrelated, self.untouched)
                self.rows.append(row | {"injection_s": edited.seconds, "survives": not why})
                if why:
                    break
                survived = after
        self.methods.append(
            {"method": method.name, "survived": survived, "why": why, **_matrices(scored_em, scored_f1)}
        )

    def _row(
        self, method: str, after: int, em: Sequence[float], f1: Sequence[float], unrelated: float | None
    ) -> dict[str, object]:
        """Scores over all questions so far."""
        n, seed = self._n_asked(after), self.config.seed
        described = {"data": self.data, "method": method, "after": after, "n": n}
        scores = share("em", em[:n], seed) | share("f1", f1[:n], seed)
        return described | scores | {
            "gain": None, "gain_ci": None, "unrelated": unrelated, "injection_s": None, "survives": None,
        }  # fmt: skip

    def _batch(self, case: TaughtCase) -> int:
        """The edit batch, from 1, that teaches what the case asks."""
        return case.row // self.config.n_rows + 1

    def _n_asked(self, after: int) -> int:
        return sum(self._batch(case) <= after for case in self.facts)

    def _scores(self, texts: Sequence[str]) -> tuple[list[float], list[float]]:
        """EM and F1 of answers to the first questions."""
        pairs = [(text, case.probe.answers) for text, case in zip(texts, self.facts, strict=False)]
        return [exact_match(*pair) for pair in pairs], [token_f1(*pair) for pair in pairs]

    def _write(self, method: Method, edited: Edited, cases: Sequence[TaughtCase]) -> list[str]:
        return [
            text
            for asked in self._asked(method, edited, cases)
            for text in asked.write(self.models.llm, self.generation)
        ]

    def _unrelated(self, method: Method, edited: Edited, after: int) -> float | None:
        """Nats per token of what is to be left alone, with no passage where the row's batch is still to be taught."""
        cases = [case if self._batch(case) <= after else replace(case, edits=(), passages=()) for case in self.others]
        scores = [
            score
            for asked in self._asked(method, edited, cases)
            for score in asked.nats(self.models.llm, self.generation)
        ]
        return sum(scores) / len(scores) if scores else None

    def _asked(self, method: Method, edited: Edited, cases: Sequence[TaughtCase]) -> Iterator[AskedCases]:
        for first in range(0, len(cases), _BATCH):
            yield AskedCases.of(edited, cases[first : first + _BATCH], is_rag=ways_of(method)[0])


def _matrices(scored_em: Sequence[Scored], scored_f1: Sequence[Scored]) -> dict[str, object]:
    em, f1 = forgetting_matrix(scored_em), forgetting_matrix(scored_f1)
    figures = {"average": average_score(em), "bwt": backward_transfer(em), "bwt_f1": backward_transfer(f1)}
    return {
        "matrix": em.rows(),
        "matrix_f1": f1.rows(),
        "matrix_n": em.counts.tolist(),
        **{name: None if math.isnan(value) else value for name, value in figures.items()},
    }
