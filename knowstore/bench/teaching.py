"""What benches of teaching methods share: edit sets and methods made ready, and questions asked of a taught LLM."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from knowstore._answering import prompt_of
from knowstore._loaded import LoadedModels, OnProgress
from knowstore.baselines import (
    Edited,
    EditProbe,
    EditQuestion,
    EditRow,
    Method,
    Resources,
    Served,
    draw_edits,
    load_edits,
    make_method,
    usable_methods,
)
from knowstore.bench.corpus import names_of
from knowstore.config import GenerationConfig, ModelConfig
from knowstore.errors import ConfigError
from knowstore.models.files import default_cache_dir
from knowstore.records import MountedExpert, Passage

if TYPE_CHECKING:
    from knowstore.experts import Experts, FrozenLLM, Prompt


@dataclass(frozen=True)
class ReadyMethods:
    """The models, the rows drawn of each file by its name, and methods with the seconds that preparing each took."""

    models: LoadedModels
    sets: list[tuple[str, list[EditRow]]]
    methods: list[tuple[Method, float]]


def ready_methods(
    data: Sequence[Path],
    names: Sequence[str],
    *,
    corpus: Sequence[Path],
    train: Sequence[Path],
    models: ModelConfig | None,
    limit: int,
    seed: int,
    n_steps: int,
    cache_dir: Path | None,
    on_progress: OnProgress | None,
) -> ReadyMethods:
    """Load models, draw `limit` rows of each file, and prepare `base` and the methods `names`, each once.

    Args:
        models: a `dtype` of `auto` means float32 here, for small changes of weights are lost in bfloat16.
        n_steps: train the networks of MEND and MALMEN.

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: no rows, or a method that is not there or lacks what it needs.
    """
    config = models or ModelConfig()
    if config.dtype == "auto":
        config = replace(config, dtype="float32")
    loaded = LoadedModels(config, on_progress=on_progress)
    every = [(name, load_edits(path)) for path, name in zip(data, names_of(data), strict=True)]
    kept_out = frozenset(question for _, rows in every for row in rows for question in row.questions)
    resources = Resources(loaded, corpus, train, kept_out, n_steps=n_steps, cache_dir=cache_dir or default_cache_dir())
    chosen = [make_method(name, resources) for name in dict.fromkeys(["base", *names])]
    sets = [(name, draw_edits(rows, limit, seed)) for name, rows in every]
    for name, rows in sets:
        if not rows:
            raise ConfigError(
                f"{name} has no edits",
                kept="nothing was measured",
                fix="give an edit set or questions {question, answers, passage}",
            )
    return ReadyMethods(loaded, sets, [(method, _prepare(method, loaded, on_progress)) for method in chosen])


def usable_names(corpus: Sequence[Path], train: Sequence[Path]) -> list[str]:
    """The methods that lack nothing."""
    return [name for name, lacks in usable_methods(corpus, train).items() if not lacks]


def _prepare(method: Method, loaded: LoadedModels, on_progress: OnProgress | None) -> float:
    llm = loaded.llm  # which the first to ask for it loads
    started = time.perf_counter()
    method.prepare(llm, on_progress)
    return time.perf_counter() - started


@dataclass(frozen=True)
class TaughtCase:
    """A probe of the row that is the `row`-th of its data; `edits` are places among all edits that are taught, and
    `passages` those of these edits."""

    probe: EditProbe
    row: int
    edits: tuple[int, ...]
    passages: tuple[Passage, ...]


def cases_of(rows: Sequence[EditRow], group: Sequence[int]) -> list[TaughtCase]:
    """The probes of some rows, whose edits are taught in this order."""
    out, first = [], 0
    for place in group:
        row = rows[place]
        out += [
            TaughtCase(
                probe, place, tuple(first + edit for edit in probe.edits),
                tuple(row.edits[edit].passage for edit in probe.edits),
            )
            for probe in row.probes
        ]  # fmt: skip
        first += len(row.edits)
    return out


@dataclass(frozen=True)
class AskedCases:
    """Cases as they are put to an LLM that was taught: their prompts, and what is mounted at `layer`."""

    cases: Sequence[TaughtCase]
    prompts: list[Prompt]
    experts: Experts | None
    layer: int

    @classmethod
    def of(cls, edited: Edited, cases: Sequence[TaughtCase], *, is_rag: bool) -> AskedCases:
        """With `is_rag` passages stand in the prompts, those that the method found or else those of the cases."""
        asked = [EditQuestion(case.probe.question, case.edits) for case in cases]
        served = Served() if edited.serve is None else edited.serve(asked)
        known: list[Sequence[Passage | MountedExpert]] = [case.passages for case in cases]
        read = known if served.passages is None else served.passages
        prompts = [
            prompt_of(case.probe.question, some if is_rag else ()) for case, some in zip(cases, read, strict=True)
        ]
        return cls(cases, prompts, served.experts, edited.layer)

    def write(self, llm: FrozenLLM, generation: GenerationConfig) -> list[str]:
        """What the LLM answers alone, greedily."""
        from knowstore.experts import generate

        return [one.text for one in generate(llm, self.prompts, self.experts, self.layer, generation)]

    def force(self, llm: FrozenLLM, generation: GenerationConfig) -> list[float]:
        """The teacher-forced scores of the first accepted answers (`experts.forced_scores`)."""
        from knowstore.experts import forced_scores

        return forced_scores(llm, self.prompts, self._firsts(), self.experts, self.layer, generation)

    def nats(self, llm: FrozenLLM, generation: GenerationConfig) -> list[float]:
        """Nats per token of the first accepted answers (`experts.forced_nats`)."""
        from knowstore.experts import forced_nats

        return forced_nats(llm, self.prompts, self._firsts(), self.experts, self.layer, generation)

    def _firsts(self) -> list[str]:
        return [case.probe.answers[0] for case in self.cases]


def ways_of(method: Method) -> tuple[bool, ...]:
    """Whether passages stand in the prompt, of each way to ask; `base` with its passage is `rag`."""
    return {"base": (False,), "rag": (True,), "rag, found": (True,)}.get(method.name, (False, True))
