"""Meta-learning of hypernetworks: for `tokens` first where answers stand, then Eq. 5, the likelihood of the answer.

A run of `tokens` has two parts. *Pointing* trains the encoder, the keys and the query experts on the losses of
`losses.py` that need no block above the mount layer, at a third of the cost of a step of Eq. 5. *Answering* adds
Eq. 5 with experts mounted as they are served: the static expert is trained first and alone, so that knowledge and
format are not confused, then everything.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from knowstore.errors import TrainingError
from knowstore.experts.hypernetwork import Hypernetwork, described_hypernetwork
from knowstore.experts.llm import FrozenLLM
from knowstore.experts.pooled import PooledHypernetwork
from knowstore.experts.reader import ReaderHypernetwork
from knowstore.experts.tokens import TokensHypernetwork
from knowstore.retrieval import Reranker
from knowstore.training.checkpoints import read_checkpoint, write_checkpoint
from knowstore.training.data import TrainingData
from knowstore.training.extent import fraction_done, n_kept_out, no_gradient, no_steps
from knowstore.training.pooled import PooledRun
from knowstore.training.ranks import Ranks
from knowstore.training.reader import ReaderRun, ReaderTeacher
from knowstore.training.run import Batch, Run, TokensRun
from knowstore.training.signals import Signals
from knowstore.training.start import analytic_start, pooled_start

_START_PROMPTS = 1500


@dataclass(frozen=True)
class TrainingConfig:
    """How a hypernetwork is trained.

    The run ends after `minutes`, or after `steps` or `epochs` when one of these is given; the first `pointing_share`
    of it is pointing. Answering starts with `static_steps` of the static expert alone. In each part learning rates
    (`encoder_rate` for the encoder, `learning_rate` for all else; times `answering_factor` while answering) rise over
    `warmup` steps, then fall to `last_share` of themselves, linearly or as a cosine. A batch holds up to
    `batch_questions` questions on passages of up to `batch_pieces` word pieces in all; a passage gives up to
    `n_per_passage` questions an epoch. `n_held_out` questions (a tenth of them and at most 200 when None), with the
    passages that they stand in, are kept out to validate; of these the answers to about `n_generated` are generated.
    With a `patience` the run ends after so many validations in a row that did not raise gold minus shuffled F1, and
    the best weights are kept. A step averages the losses of `batches_per_step` batches, one for each process when None.
    `distil_weight`, `contrast_weight`, `nothing_weight` and `completion_weight` weigh the signals of `signals.py` while
    answering. In Eq. 5 of `tokens` the experts of `n_mounted` passages of a batch are mounted together; with
    `has_hard_negatives` up to four passages of one title stand in a batch and are the first to be mounted beside each
    other, but not where questions kept out are asked. `pooled_start` says whether the first weights of `pooled` are
    drawn, as the paper's, or `start.py`'s.
    """

    minutes: float = 75.0
    steps: int | None = None
    epochs: float | None = None
    pointing_share: float = 0.6
    static_steps: int = 60
    batch_questions: int = 48
    batch_pieces: int = 1500
    n_per_passage: int = 6
    learning_rate: float = 1e-3
    encoder_rate: float = 1e-4
    static_rate: float = 2e-3
    weight_decay: float = 0.01
    answering_factor: float = 0.5
    warmup: int = 40
    schedule: Literal["linear", "cosine"] = "linear"
    last_share: float = 0.03
    max_gradient_norm: float = 2.0
    silence_weight: float = 0.3
    pointing_weight: float = 0.3
    distil_weight: float = 0.0
    contrast_weight: float = 0.0
    nothing_weight: float = 0.0
    completion_weight: float = 0.0
    n_mounted: int = 2
    has_hard_negatives: bool = False
    n_held_out: int | None = None
    n_generated: int = 60
    patience: int | None = None
    validate_every: int = 200
    checkpoint_every_s: float = 300.0
    batches_per_step: int | None = None
    pooled_start: Literal["paper", "analytic"] = "paper"
    seed: int = 0

    @classmethod
    def paper(cls) -> TrainingConfig:
        """The paper's recipe: AdamW, one epoch of Eq. 5, a cosine from 1e-4 to 1e-6."""
        return cls(
            epochs=1.0, pointing_share=0.0, static_steps=0, pointing_weight=0.0, learning_rate=1e-4, warmup=0,
            schedule="cosine", last_share=0.01, answering_factor=1.0,
        )  # fmt: skip


@dataclass(frozen=True)
class TrainingProgress:
    """One line of the log. `loss` is the sum that the step minimised; `answer` is Eq. 5 in nats per answer token,
    None while pointing; `distil`, `contrast`, `nothing` and `completion` are the signals of `signals.py` that are on;
    `accuracy` is the share of questions whose first answer token is pointed at within its sentence, None for a kind
    that does not point. `gold` and `shuffled` are nats per answer token on the questions kept out, with the passage's
    expert and with another's, or for a `reader` with the passage or another in the prompt; `held_out_accuracy` is on
    the same questions, and `gold_em`, `gold_f1`, `shuffled_em` and `shuffled_f1` are of answers that were generated to
    some."""

    step: int
    seconds: float
    fraction: float
    part: str
    loss: float
    gradient_norm: float
    accuracy: float | None = None
    answer: float | None = None
    distil: float | None = None
    contrast: float | None = None
    nothing: float | None = None
    completion: float | None = None
    gold: float | None = None
    shuffled: float | None = None
    held_out_accuracy: float | None = None
    gold_em: float | None = None
    gold_f1: float | None = None
    shuffled_em: float | None = None
    shuffled_f1: float | None = None


def train_hypernetwork(
    hypernetwork: Hypernetwork,
    llm: FrozenLLM,
    data: TrainingData,
    config: TrainingConfig,
    folder: Path,
    *,
    is_started: bool = False,
    reranker: Reranker | None = None,
    beside: TokensHypernetwork | None = None,
    teacher: ReaderHypernetwork | None = None,
    ranks: Ranks | None = None,
    made_with: Mapping[str, str] | None = None,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> TrainingProgress:
    """Train a hypernetwork in place.

    The folder takes the log (`log.jsonl`) and a checkpoint from which the same call goes on. `pooled` and `reader`
    are trained by Eq. 5 from the first step to the last, whatever the config says of the other parts.

    Args:
        is_started: the hypernetwork was trained before and keeps its statistics of the LLM.
        reranker: weighs sentences and words as when experts are served; None trains with weights that look alike.
        beside: to train a `reader`: the hypernetwork whose experts are mounted beside the prompt in a share of the
            batches, weighed by `reranker`; None for prompts alone.
        teacher: the reader whose answers a `distil_weight` makes more likely.
        ranks: the processes that train together, each of which calls this with the same arguments; the first alone
            reads and writes `folder`. None trains in this process alone.
        made_with: digests of the language model and of what the hypernetwork started from, by name; a checkpoint that
            was made with others is refused.
        on_progress: called after every step, in the first process alone.

    Returns: the log's line of the step whose weights are kept, with the last validation up to it.

    Raises:
        TrainingError: a kind that cannot be trained, or not by these signals or with as many passages mounted,
            `distil_weight` without a teacher, `beside` without a reranker, too few questions, a run without a step,
            batches that cannot be shared out, a checkpoint of another run, or a loss that is not finite; the last
            checkpoint stays.
    """
    is_tokens = isinstance(hypernetwork, TokensHypernetwork)
    if config.n_mounted < 2 or (config.n_mounted > 2 and not is_tokens):
        raise TrainingError(
            f"n_mounted is {config.n_mounted} for a hypernetwork of kind {hypernetwork.config.kind!r}",
            kept="nothing was trained", fix="give two or more, and more than two for `tokens` alone",
        )  # fmt: skip
    ranks = ranks or Ranks()
    config = replace(config, batches_per_step=_shared_out(config.batches_per_step, ranks))
    run: Run
    if isinstance(hypernetwork, PooledHypernetwork):
        run = PooledRun(hypernetwork, llm, data, config.n_per_passage)
        config = replace(config, pointing_share=0.0, static_steps=0)
    elif isinstance(hypernetwork, ReaderHypernetwork):
        experts = None if beside is None else TokensRun(beside, llm, data, config.n_per_passage, reranker)
        run = ReaderRun(hypernetwork, llm, data, config.n_per_passage, experts)
        config = replace(config, pointing_share=0.0, static_steps=0)
    elif isinstance(hypernetwork, TokensHypernetwork):
        run = TokensRun(hypernetwork, llm, data, config.n_per_passage, reranker, config.n_mounted)
    else:
        raise TrainingError(
            f"a hypernetwork of kind {hypernetwork.config.kind!r} cannot be trained", kept="nothing was trained",
            fix="train one of kind `tokens`, `pooled` or `reader`",
        )  # fmt: skip
    run.signals, run.has_hard_negatives = _signals(run, config, teacher), config.has_hard_negatives
    hypernetwork.set_trainable()
    held_out, train = _split(run, config)
    if len(train) < 2:
        raise TrainingError(
            f"{len(train)} passages with questions to train on, and {len(held_out)} kept out; a batch takes two",
            kept="nothing was trained", fix="give more questions",
        )  # fmt: skip
    run.train_on(train)
    if config.epochs is not None:
        n_batches = len(_epoch(run, config, train, 0))
        config = replace(config, steps=math.ceil(config.epochs * n_batches / (config.batches_per_step or 1)))
    if config.patience is not None and not (held_out and config.n_generated):
        raise TrainingError(
            "there are no questions kept out whose answers could tell when to end", kept="nothing was trained",
            fix="give ten questions or more, or no patience",
        )  # fmt: skip
    loop = _Loop(run, config, folder / "checkpoint", ranks, made_with or {})
    if not loop.resume() and not is_started:
        draw = random.Random(config.seed)
        some = [question for passage in train for question in run.by_passage[passage]]
        chosen = draw.sample(some, min(len(some), _START_PROMPTS))
        prompts = [run.questions[question].ids for question in chosen]
        if isinstance(hypernetwork, TokensHypernetwork):
            analytic_start(hypernetwork, llm, prompts)
        elif isinstance(run, PooledRun) and config.pooled_start == "analytic":
            pooled_start(run.network, llm, prompts, run.means[train])
    ranks.copy_first(hypernetwork.own_tensors().values())
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
    while loop.goes_on():
        progress = loop.step(train, held_out)
        if ranks.is_first:
            _log(folder, progress)
            if on_progress is not None:
                on_progress(progress)
    if loop.kept is None:
        raise no_steps()
    loop.checkpoint()
    if loop.best:
        hypernetwork.load_state_dict(loop.best, strict=False)
    return loop.kept


def _signals(run: Run, config: TrainingConfig, teacher: ReaderHypernetwork | None) -> Signals:
    """The signals that are on, and who teaches."""
    weights = config.distil_weight, config.contrast_weight, config.nothing_weight, config.completion_weight
    if any(weights) and isinstance(run, ReaderRun):
        raise TrainingError(
            "a reader is trained by Eq. 5 alone", kept="nothing was trained",
            fix="leave distil_weight, contrast_weight, nothing_weight and completion_weight at 0",
        )  # fmt: skip
    if not config.distil_weight:
        return Signals(*weights)
    if teacher is None:
        raise TrainingError(
            "there is no reader to distil", kept="nothing was trained",
            fix="train one for this language model with `knowstore train reader`, or leave distil_weight at 0",
        )  # fmt: skip
    return Signals(*weights, ReaderTeacher(teacher, run.llm, run.data))


def _shared_out(batches_per_step: int | None, ranks: Ranks) -> int:
    """Batches of a step, as many for each process."""
    n = ranks.size if batches_per_step is None else batches_per_step
    if n < 1 or n % ranks.size:
        raise TrainingError(
            f"{n} batches a step for {ranks.size} processes", kept="nothing was trained",
            fix="give a multiple of the number of processes",
        )  # fmt: skip
    return n


def _log(folder: Path, progress: TrainingProgress) -> None:
    """Write a line of the log."""
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(asdict(progress)) + "\n")


class _Loop:
    """The state of a training run: what a checkpoint keeps."""

    def __init__(
        self, run: Run, config: TrainingConfig, folder: Path, ranks: Ranks, made_with: Mapping[str, str]
    ) -> None:
        self.run, self.config, self.folder, self.ranks, self.made_with = run, config, folder, ranks, made_with
        named = {name: p for name, p in run.network.named_parameters() if p.requires_grad}
        groups: dict[str, list[nn.Parameter]] = {"encoder": [], "static": [], "other": []}
        for name, parameter in named.items():
            kind = "encoder" if name.startswith("encoder.") else "static" if name.startswith("static") else "other"
            groups[kind].append(parameter)
        rates = {"encoder": config.encoder_rate, "static": config.learning_rate, "other": config.learning_rate}
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "name": kind, "rate": rates[kind]} for kind, parameters in groups.items()],
            lr=0.0, weight_decay=config.weight_decay, betas=(0.9, 0.98),
        )  # fmt: skip
        self.trained = list(named.values())
        self.done, self.begun = 0, 0.0
        self.kept: TrainingProgress | None = None
        self.best: dict[str, Tensor] = {}
        self.n_worse = 0
        self.answering_from: int | None = None
        self.answering_since = config.pointing_share
        self.started = self.saved = time.monotonic()
        self.epoch, self.position, self.batches = 0, 0, list[Batch]()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def fraction(self) -> float:
        """How much of the run is behind."""
        if self.config.patience is not None and self.n_worse >= self.config.patience:
            return 1.0
        if self.config.steps is None:
            return fraction_done(self.seconds, 60 * self.config.minutes)
        return fraction_done(self.done, self.config.steps)

    def goes_on(self) -> bool:
        """Whether there is another step: the first process's clock and validations decide, so that all end together."""
        self.begun = self.ranks.of_first(self.fraction)
        return self.begun < 1

    def step(self, train: Sequence[int], held_out: Sequence[int]) -> TrainingProgress:
        """One step, and what it says."""
        config, fraction = self.config, self.begun
        if self.answering_from is None and fraction >= config.pointing_share:
            self.answering_from, self.answering_since = self.done, fraction
        part, is_static = self._part()
        self._set_rates(part, fraction)
        self.run.network.train()
        self.optimizer.zero_grad()
        said = self._backward(train, part, is_static=is_static)
        loss = said["loss"]
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.done}", kept=f"the last checkpoint in {self.folder}",
                fix="run again with a lower learning rate",
            )  # fmt: skip
        norm = nn.utils.clip_grad_norm_(self.trained, config.max_gradient_norm).item()
        if not math.isfinite(norm):
            raise no_gradient(norm, self.done, self.folder)
        self.optimizer.step()
        self.done += 1
        measured: dict[str, float] = {}
        is_end = config.patience is not None and self.ranks.of_first(self.fraction) >= 1
        if held_out and (is_end or self.done % config.validate_every == 0):
            measured = self.ranks.of_first(self._validate(held_out) if self.ranks.is_first else {})
        progress = TrainingProgress(
            self.done, self.seconds, self.fraction, part, gradient_norm=norm, **said, **measured
        )
        self._keep(progress, is_validated=bool(measured))
        if time.monotonic() - self.saved >= config.checkpoint_every_s:
            self.checkpoint()
        return progress

    def _backward(self, train: Sequence[int], part: str, *, is_static: bool) -> dict[str, float]:
        """Gradients of the mean of a step's losses over all its batches, of which each process takes its share, and the
        means of what they say."""
        n_batches = self.config.batches_per_step or 1
        batches = [self._batch(train) for _ in range(n_batches)]
        told: list[dict[str, float]] = []
        for place in range(self.ranks.rank, n_batches, self.ranks.size):
            draw = random.Random(f"{self.config.seed}/{self.done}" + (f"/{place}" if place else ""))
            loss, said = self._loss(batches[place], draw, part, is_static=is_static)
            (loss * self.ranks.size / n_batches).backward()  # type: ignore[no-untyped-call]
            told.append(said)
        means = [sum(one[name] for one in told) / len(told) for name in told[0]]
        return dict(zip(told[0], self.ranks.average(self.trained, means), strict=True))

    def _loss(
        self, batch: Batch, draw: random.Random, part: str, *, is_static: bool
    ) -> tuple[Tensor, dict[str, float]]:
        """What a step minimises on a batch, and what `TrainingProgress` says of it."""
        if is_static:
            loss = self.run.static_loss(batch)
            return loss, {"loss": loss.item(), "answer": loss.item()}
        found = self.run.losses(batch, draw, is_answering=part == "answering")
        weight = 1.0 if part == "pointing" else self.config.pointing_weight
        loss = found.total(weight, self.config.silence_weight)
        return loss, {"loss": loss.item()} | found.said()

    def _keep(self, progress: TrainingProgress, *, is_validated: bool) -> None:
        """Note whose weights are kept: the latest ones, or with a patience those of the best validation."""
        if not self.best:
            before = {} if self.kept is None or is_validated else {n: getattr(self.kept, n) for n in _MEASURED}
            self.kept = replace(progress, **before)
        if self.config.patience is None or progress.gold_f1 is None:
            return
        if not self.best or _gain(progress) > _gain(self.kept):
            self.kept, self.n_worse = progress, 0
            self.best = {name: tensor.clone() for name, tensor in self.run.network.own_tensors().items()}
        else:
            self.n_worse += 1

    def _part(self) -> tuple[str, bool]:
        """The part of the run, and whether the static expert is trained alone."""
        if self.answering_from is None:
            return "pointing", False
        return "answering", self.done - self.answering_from < self.config.static_steps

    def _set_rates(self, part: str, fraction: float) -> None:
        config = self.config
        first = self.answering_from or 0
        share, after = (0.0, config.pointing_share) if part == "pointing" else (self.answering_since, 1.0)
        within = min(1.0, max(0.0, (fraction - share) / max(after - share, 1e-9)))
        left = 1 - within if config.schedule == "linear" else (1 + math.cos(math.pi * within)) / 2
        rise = min(1, (self.done - first + 1) / config.warmup) if config.warmup else 1.0
        factor = rise * (config.last_share + (1 - config.last_share) * left)
        _, is_static = self._part()
        for group in self.optimizer.param_groups:
            of_part = config.answering_factor if part == "answering" else 1.0
            group["lr"] = 0.0 if is_static else group["rate"] * of_part * factor
            if is_static and group["name"] == "static":
                group["lr"] = config.static_rate * min(1, (self.done - first + 1) / 10)

    def _batch(self, train: Sequence[int]) -> Batch:
        """The next batch; epochs are drawn anew, each from its own seed."""
        if not self.batches:
            self._draw_epoch(train)
        if self.position >= len(self.batches):
            self.epoch, self.position = self.epoch + 1, 0
            self._draw_epoch(train)
        self.position += 1
        return self.batches[self.position - 1]

    def _draw_epoch(self, train: Sequence[int]) -> None:
        self.batches = _epoch(self.run, self.config, train, self.epoch)

    @torch.no_grad()
    def _validate(self, held_out: Sequence[int]) -> dict[str, float]:
        """What `TrainingProgress` says of the questions kept out; only pointing while nothing else is trained."""
        config, run = self.config, self.run
        run.network.eval()
        batches = run.batches(held_out, "held out", config.batch_pieces, config.batch_questions)
        sums: dict[str, float] = {}
        n_questions, n_generated = sum(len(batch.rows) for batch in batches), 0
        for batch in batches:
            n = len(batch.rows)
            found: dict[str, float] = {}
            pointed = run.losses(batch, random.Random(0), is_answering=False).accuracy
            if pointed is not None:
                found["held_out_accuracy"] = n * pointed
            if self.answering_from is not None:
                is_generated = n_generated < config.n_generated
                for control, is_own in (("gold", True), ("shuffled", False)):
                    given = run.validated(batch, is_own=is_own)
                    found[control] = n * run.answer_nats(batch, given)
                    if is_generated:
                        scores = run.scores(batch, given)
                        found[f"{control}_em"] = sum(em for em, _ in scores)
                        found[f"{control}_f1"] = sum(f1 for _, f1 in scores)
                n_generated += n if is_generated else 0
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value
        return {
            name: value / (n_generated if name.endswith(("_em", "_f1")) else n_questions)
            for name, value in sums.items()
        }

    def checkpoint(self) -> None:
        """Weights and optimiser state as safetensors, then `run.json`, which makes them count; in the first process."""
        self.saved = time.monotonic()
        if not self.ranks.is_first:
            return
        tensors = {f"weights/{name}": tensor for name, tensor in self.run.network.own_tensors().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        described = {
            "step": self.done, "seconds": self.seconds, "epoch": self.epoch, "position": self.position,
            "config": asdict(self.config),
            "answering_from": self.answering_from, "answering_since": self.answering_since,
            "made_with": self._made_with(), "kept": None if self.kept is None else asdict(self.kept),
            "n_worse": self.n_worse,
        }  # fmt: skip
        write_checkpoint(self.folder, self.done, described, tensors, self.optimizer)

    def resume(self) -> bool:
        """Go on from the checkpoint, if there is one.

        Raises:
            TrainingError: it is of a run with other settings, models or data.
        """
        found = self.ranks.of_first(read_checkpoint(self.folder) if self.ranks.is_first else None)
        if found is None:
            return False
        described = found.described
        settings = TrainingConfig(**described["config"])
        settings = replace(settings, batches_per_step=settings.batches_per_step or 1)
        made_with = self._made_with()
        lately = {name: made_with[name] for name in ("data", *self.made_with)}  # older checkpoints do not name them
        was_made_with = lately | (described.get("made_with") or {})
        if was_made_with != made_with or settings != self.config:
            raise TrainingError(
                f"{self.folder} holds a checkpoint of a run with other settings or models, or on other questions",
                kept="the checkpoint", fix="train with the settings of that run, or into another folder",
            )  # fmt: skip
        self.run.network.load_state_dict(found.of("weights"), strict=False)
        found.restore(self.optimizer)
        self.epoch, self.position = described["epoch"], described["position"]
        self.done, self.started = described["step"], time.monotonic() - described["seconds"]
        self.answering_from, self.answering_since = described["answering_from"], described["answering_since"]
        self.best = found.of("best")
        self.kept = None if described["kept"] is None else TrainingProgress(**described["kept"])
        self.n_worse = described["n_worse"]
        return True

    def _made_with(self) -> dict[str, Any]:
        """What beside the settings decides how a run goes on."""
        reranker, beside = self.run.reranker, self.run.beside
        made_with = {
            "network": described_hypernetwork(self.run.network),
            "reranker": None if reranker is None else reranker.fingerprint,
            "beside": None if beside is None else beside.network.fingerprint(),
            "data": self.run.data.fingerprint(),
            **self.made_with,
        }
        if (teacher := self.run.signals.teacher) is not None:
            made_with["teacher"] = teacher.fingerprint()
        return dict(json.loads(json.dumps(made_with)))


def _epoch(run: Run, config: TrainingConfig, train: Sequence[int], epoch: int) -> list[Batch]:
    """The batches of an epoch, drawn from its own seed."""
    return run.batches(
        train, f"{config.seed}/{epoch}", config.batch_pieces, config.batch_questions,
        is_plain=not config.has_hard_negatives,
    )  # fmt: skip


_MEASURED = ("gold", "shuffled", "held_out_accuracy", "gold_em", "gold_f1", "shuffled_em", "shuffled_f1")


def _gain(progress: TrainingProgress | None) -> float:
    """Gold minus shuffled F1."""
    return 0.0 if progress is None else (progress.gold_f1 or 0.0) - (progress.shuffled_f1 or 0.0)


def _split(run: Run, config: TrainingConfig) -> tuple[list[int], list[int]]:
    """Passages kept out with about as many questions as are to be, and all others that have questions."""
    order = sorted(run.by_passage)
    random.Random(config.seed).shuffle(order)
    held_out: list[int] = []
    n, n_wanted = 0, n_kept_out(config.n_held_out, run.data)
    while order and (n < n_wanted or len(held_out) == 1):  # a passage is compared with another
        held_out.append(order.pop())
        n += len(run.by_passage[held_out[-1]])
    return held_out, order
