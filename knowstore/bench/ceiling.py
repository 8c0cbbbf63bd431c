"""What experts could carry: experts of single passages that are trained by gradient, where a hypernetwork's come from
one forward pass.

Of each passage one question is asked. An expert is taught either its other questions, which is what gradients find out
about the passage without the one that is asked, or all of them: whether an expert of this form can hold what is asked
about a passage at all. It starts as what the hypernetwork makes of the passage, or from nothing, beside the FFNs of any
blocks and with a ReLU as in Eq. 2 or a softmax over its neurons in its place.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from knowstore._answering import prompt_of
from knowstore._loaded import LoadedModels, OnProgress
from knowstore.bench.controls import Case, ControlBench, read_cases
from knowstore.bench.corpus import names_of
from knowstore.bench.scoring import scored
from knowstore.config import GenerationConfig, ModelConfig
from knowstore.errors import ConfigError
from knowstore.models import NO_READER

if TYPE_CHECKING:
    from torch import Tensor

Activation = Literal["relu", "softmax"]
Taught = Literal["other questions", "all questions"]

_TAUGHT: tuple[Taught, ...] = ("other questions", "all questions")
_ENOUGH_NATS = 0.02  # of a taught answer's tokens


@dataclass(frozen=True)
class CeilingConfig:
    """Experts from nothing are compared at each of `layers`, sets of 0-based blocks that each have one, and with each
    of `activations`; they have `rank` neurons. Up to `limit` passages are drawn with `seed`, and `n_questions` of each;
    training takes up to `steps`, at `learning_rate` from nothing and at `generated_rate` from a generated expert;
    answers have up to `max_tokens`."""

    layers: tuple[tuple[int, ...], ...] = ((12,),)
    activations: tuple[Activation, ...] = ("relu", "softmax")
    limit: int = 40
    n_questions: int = 4
    rank: int = 64
    steps: int = 60
    learning_rate: float = 1e-2
    generated_rate: float = 1e-3
    seed: int = 0
    max_tokens: int = 32


def run_ceiling(
    data: Sequence[Path],
    *,
    config: CeilingConfig | None = None,
    models: ModelConfig | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, object]:
    """Train experts of single passages, and score what they answer to one question of each.

    Args:
        data: files in the QA row format of which some passages have several questions.
        config: what is trained.
        models: the hypernetwork's query and static experts are mounted with all experts; its reader is not used.

    Returns: `rows` of {data, start, taught, layers, activation, n, em, em_ci, f1, f1_ci, nats}, scores from 0 to 1 with
        bootstrap 95 % intervals, where `start` is `generated` or `nothing`, `taught` is None for what the hypernetwork
        made, and `nats` is the mean loss a token of what was taught, at the end; `config` and `seconds`.

    Raises:
        ConfigError: no passage with enough questions, or blocks that the LLM does not have.
        TrainingError: a file that cannot be read.
    """
    started = time.perf_counter()
    config = config or CeilingConfig()
    loaded = LoadedModels(replace(models or ModelConfig(), reader=NO_READER), on_progress=on_progress)
    loaded.check_trained()
    _check_layers(config.layers, loaded.llm.n_layers)
    rows: list[dict[str, Any]] = []
    for path, name in zip(data, names_of(data), strict=True):
        groups = _groups(path, config)
        cases = [case for group in groups for case in group]
        bench = ControlBench(loaded, name, cases, config.seed, GenerationConfig(max_tokens=config.max_tokens), None)
        rows += _Ceiling(bench, groups, config, on_progress).rows()
    return {"rows": rows, "config": asdict(config), "seconds": time.perf_counter() - started}


def _check_layers(sets: Sequence[Sequence[int]], n: int) -> None:
    for layers in sets:
        if len(set(layers)) < len(layers) or not all(0 <= layer < n for layer in layers):
            raise ConfigError(
                f"layers {list(layers)} of a model of {n} layers cannot have an expert each",
                kept="nothing was measured", fix=f"name different layers from 0 to {n - 1}",
            )  # fmt: skip


def _groups(path: Path, config: CeilingConfig) -> list[list[Case]]:
    """The questions of each drawn passage; the first is asked."""
    found: dict[str, list[Case]] = {}
    for case in read_cases(path, None, config.seed):
        if all(case.question != other.question for other in found.get(case.passage.passage_id, [])):
            found.setdefault(case.passage.passage_id, []).append(case)
    groups = [cases[: config.n_questions] for cases in found.values() if len(cases) >= config.n_questions]
    if not groups:
        raise ConfigError(
            f"{path} has no passage with {config.n_questions} questions", kept="nothing was measured",
            fix="give a file of several questions a passage, or ask for fewer",
        )  # fmt: skip
    random.Random(config.seed).shuffle(groups)
    return groups[: config.limit]


class _Ceiling:
    """The passages of one file and their questions, of which each passage's first is asked."""

    def __init__(
        self, bench: ControlBench, groups: Sequence[Sequence[Case]], config: CeilingConfig,
        on_progress: OnProgress | None,
    ) -> None:  # fmt: skip
        self.bench, self.config, self.on_progress = bench, config, on_progress
        self.llm, self.network = bench.models.llm, bench.models.hypernetwork
        self.groups: list[range] = []
        for group in groups:
            first = self.groups[-1].stop if self.groups else 0
            self.groups.append(range(first, first + len(group)))

    def rows(self) -> list[dict[str, Any]]:
        config, layer = self.config, self.network.config.layer
        runs: list[tuple[str, Taught | None, tuple[int, ...], Activation]] = [
            ("generated", taught, (layer,), "relu") for taught in (None, *_TAUGHT)
        ]
        runs += [
            ("nothing", taught, layers, activation)
            for layers in config.layers for activation in config.activations for taught in _TAUGHT
        ]  # fmt: skip
        if self.network.config.kind != "tokens":
            runs = [run for run in runs if run[0] == "nothing"]
        return [self._row(*run, f"{place}/{len(runs)}") for place, run in enumerate(runs, 1)]

    def _row(
        self, start: str, taught: Taught | None, layers: tuple[int, ...], activation: Activation, place: str
    ) -> dict[str, Any]:
        texts: list[str] = []
        losses: list[float] = []
        for done, group in enumerate(self.groups):
            if self.on_progress is not None:
                self.on_progress(f"{self.bench.name}: experts {place}", done, len(self.groups))
            questions = [] if taught is None else list(group[1:] if taught == "other questions" else group)
            if start == "generated":
                text, loss = self._generated(group[0], questions)
            else:
                text, loss = self._from_nothing(group[0], questions, layers, activation)
            texts.append(text)
            losses.append(loss)
        accepted = [self.bench.cases[group[0]].answers for group in self.groups]
        described: dict[str, Any] = {"data": self.bench.name, "start": start, "taught": taught}
        described |= {"layers": list(layers), "activation": activation}
        nats = None if taught is None else sum(losses) / len(losses)
        return described | scored(texts, accepted, self.config.seed) | {"nats": nats}

    def _generated(self, asked: int, taught: list[int]) -> tuple[str, float]:
        """The answer by what the hypernetwork made of a passage, after some of its questions were taught to it."""
        from knowstore.experts import mount

        at_question = self.bench.mounted([asked], [asked])
        if not taught or at_question.up is None or at_question.down is None:
            return self._answer(asked, at_question), 0.0
        up, down = (part.float().clone().requires_grad_() for part in (at_question.up, at_question.down))
        served = self.bench.mounted(taught, taught)
        n = len(taught)

        def learning() -> AbstractContextManager[None]:
            now = [part.to(self.llm.dtype).expand(n, -1, -1) for part in (up, down)]
            return mount(self.llm.model, replace(served, up=now[0], down=now[1]), self.network.config.layer)

        loss = self._learn([up, down], taught, learning, self.config.generated_rate)
        parts = [part.detach().to(self.llm.dtype) for part in (up, down)]
        return self._answer(asked, replace(at_question, up=parts[0], down=parts[1])), loss

    def _from_nothing(
        self, asked: int, taught: list[int], layers: tuple[int, ...], activation: Activation
    ) -> tuple[str, float]:
        """The answer by experts that some questions were taught to, mounted beside what belongs to no passage."""
        import torch

        from knowstore.experts import beside, mount

        width, rank = self.llm.embeddings.shape[1], self.config.rank
        draw = torch.Generator().manual_seed(self.config.seed)
        shared = self.network.static_experts(self.llm)
        parts: list[Tensor] = []

        def learning() -> AbstractContextManager[None]:
            return mount(self.llm.model, shared, self.network.config.layer)

        with ExitStack() as stack:
            for layer in layers:
                first = torch.randn(width, rank, generator=draw) / width**0.5, torch.zeros(rank, width)
                up, down = (part.to(self.llm.device).requires_grad_() for part in first)
                parts += [up, down]
                stack.enter_context(beside(self.llm.model, layer, _free(up, down, activation)))
            loss = self._learn(parts, taught, learning, self.config.learning_rate)
            return self._answer(asked, shared), loss

    def _learn(
        self,
        parts: list[Tensor],
        taught: Sequence[int],
        learning: Callable[[], AbstractContextManager[None]],
        rate: float,
    ) -> float:
        """Adam on the answers of questions, until they are known or `steps` are over; gives the last loss."""
        import torch

        from knowstore.baselines.edits import TaughtFact
        from knowstore.baselines.sequences import fact_sequence, writing_loss

        cases = [self.bench.cases[index] for index in taught]
        rows = [fact_sequence(self.llm, TaughtFact(case.question, "", case.answers[0])) for case in cases]
        optimizer = torch.optim.Adam(parts, lr=rate)
        last = 0.0
        for _ in range(self.config.steps):
            optimizer.zero_grad()
            with learning():
                loss = writing_loss(self.llm, rows)
                last = float(loss.detach())
                if last < _ENOUGH_NATS:
                    break
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return last

    def _answer(self, asked: int, experts: Any) -> str:
        from knowstore.experts import generate

        prompt = prompt_of(self.bench.cases[asked].question, [])
        [one] = generate(self.llm, [prompt], experts, self.network.config.layer, self.bench.generation)
        return one.text


def _free(up: Tensor, down: Tensor, activation: Activation) -> Callable[[Tensor], Tensor]:
    """`act(x up) down` of an expert in the form `neurons`; a softmax has a further neuron that writes nothing, so that
    it can be silent, and its shares times the number of neurons, so that gradient steps reach as far."""
    import torch

    def output(x: Tensor) -> Tensor:
        scores = x.to(up.dtype) @ up  # (B, T, R)
        if activation == "relu":
            return scores.relu() @ down
        shares: Tensor = torch.nn.functional.pad(scores, (0, 1)).softmax(-1)[..., :-1]
        return up.shape[1] * shares @ down

    return output
