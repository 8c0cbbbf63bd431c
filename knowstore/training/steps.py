"""The steps of a reranker's training, whatever its model is: rates, log, validation, and checkpoints to go on from."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from knowstore.errors import TrainingError
from knowstore.training.checkpoints import read_checkpoint, write_checkpoint
from knowstore.training.data import TrainingData
from knowstore.training.extent import fraction_done, n_kept_out, no_gradient, no_steps


@dataclass(frozen=True)
class StepsConfig:
    """How long a reranker is trained and how its steps are taken.

    The run ends after `minutes`, or after `steps` when that is given. Learning rates rise over `warmup` steps and fall
    linearly over the run. A question comes with its own passage and `n_negatives` of the `n_mined` best passages that a
    search finds and that do not answer it. `n_held_out` questions (a tenth of them and at most 200 when None), with the
    passages that they stand in, are kept out to validate, each among `n_candidates` passages.
    """

    minutes: float = 60.0
    batch_size: int = 16
    n_negatives: int = 1
    n_mined: int = 6
    weight_decay: float = 0.01
    warmup: int = 50
    max_gradient_norm: float = 2.0
    n_held_out: int | None = None
    n_candidates: int = 6
    validate_every: int = 300
    checkpoint_every_s: float = 300.0
    seed: int = 0
    steps: int | None = None


@dataclass(frozen=True)
class RerankerProgress:
    """One line of the log.

    `loss` is that of Eq. 8, in nats. On the questions kept out: `sentence_accuracy`, how often the best sentence of
    the gold passage answers, and `gold_first`, how often that passage comes first.
    """

    step: int
    seconds: float
    fraction: float
    loss: float
    gradient_norm: float
    sentence_accuracy: float | None = None
    gold_first: float | None = None


class Stepped(Protocol):
    """A reranker in training, and the questions that are kept out to validate it."""

    held_out: list[int]

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """What a checkpoint keeps of it."""
        ...

    def set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Put in what `weights` gave."""
        ...

    def step_loss(self, step: int, draw: random.Random) -> tuple[Tensor, float]:
        """What a step minimises, and the nats of Eq. 8 in it."""
        ...

    def validate(self) -> tuple[float | None, float | None]:
        """`sentence_accuracy` and `gold_first` of `RerankerProgress`."""
        ...


def train_steps(
    run: Stepped,
    config: StepsConfig,
    optimizer: torch.optim.Optimizer,
    made_with: Mapping[str, object],
    folder: Path,
    on_progress: Callable[[RerankerProgress], None] | None = None,
) -> RerankerProgress:
    """Take the steps of a run, or those that are left of one that was cut off, and validate what it ends with.

    Args:
        run: what is trained, in place.
        optimizer: of its parameters; the `base` of each group is its highest learning rate.
        made_with: what JSON can hold of what decides the run; a checkpoint that was made with anything else is refused.
        folder: takes the log (`log.jsonl`) and `checkpoint/`.
        on_progress: called after every step.

    Returns: the log's line of the last step with how good that is on the questions kept out.

    Raises:
        TrainingError: a run without a step, a checkpoint of another run, or a loss that is not finite; the last
            checkpoint stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint"
    kept, seconds = _resume(checkpoint, run, optimizer, made_with)
    started, saved_at = time.monotonic() - seconds, time.monotonic()
    step, is_validated = 0 if kept is None else kept.step, False
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def keep(progress: RerankerProgress) -> None:
        tensors = {f"weights/{name}": tensor for name, tensor in run.weights().items()}
        described = {"kept": asdict(progress), "seconds": time.monotonic() - started, "made_with": dict(made_with)}
        write_checkpoint(checkpoint, progress.step, described, tensors, optimizer)

    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        while (fraction := _fraction(config, step, time.monotonic() - started)) < 1:
            rate = min(1, (step + 1) / max(config.warmup, 1)) * (0.03 + 0.97 * (1 - fraction))
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * rate
            run.module.train()
            loss, nats = run.step_loss(step, random.Random(f"{config.seed}/{step}"))
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"the loss is {loss.item()} at step {step}", kept=f"the last checkpoint in {checkpoint}",
                    fix="run again with lower learning rates",
                )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(parameters, config.max_gradient_norm).item()
            if not math.isfinite(norm):
                raise no_gradient(norm, step, checkpoint)
            optimizer.step()
            step += 1
            is_last = _fraction(config, step, time.monotonic() - started) >= 1
            is_validated = bool(run.held_out) and (is_last or step % config.validate_every == 0)
            quality = run.validate() if is_validated else (None, None)
            kept = RerankerProgress(step, time.monotonic() - started, fraction, nats, norm, *quality)
            log.write(json.dumps(asdict(kept)) + "\n")
            log.flush()
            if on_progress is not None:
                on_progress(kept)
            if time.monotonic() - saved_at >= config.checkpoint_every_s:
                keep(kept)
                saved_at = time.monotonic()
    if kept is None:
        raise no_steps()
    keep(kept)
    if run.held_out and not is_validated:  # the time ran out between two steps, or before this call
        sentence_accuracy, gold_first = run.validate()
        kept = replace(kept, sentence_accuracy=sentence_accuracy, gold_first=gold_first)
    run.module.eval()
    return kept


def keep_out(order: Sequence[int], config: StepsConfig, data: TrainingData) -> tuple[list[int], set[int]]:
    """The first questions of different passages, to validate, and these passages."""
    n = n_kept_out(config.n_held_out, data)
    held_out: list[int] = []
    passages: set[int] = set()
    for index in order:
        passage = data.questions[index].passage
        if len(held_out) < n and passage not in passages:
            passages.add(passage)
            held_out.append(index)
    return held_out, passages


def _fraction(config: StepsConfig, step: int, seconds: float) -> float:
    """How much of the run is behind."""
    return fraction_done(seconds, 60 * config.minutes) if config.steps is None else fraction_done(step, config.steps)


def _resume(
    folder: Path, run: Stepped, optimizer: torch.optim.Optimizer, made_with: Mapping[str, object]
) -> tuple[RerankerProgress | None, float]:
    """Take up a checkpoint, if there is one; gives its last step's line of the log, and the seconds of the run."""
    found = read_checkpoint(folder)
    if found is None:
        return None, 0.0
    if found.described.get("made_with") != made_with:
        raise TrainingError(
            f"{folder} holds a checkpoint of a run with other settings, from another start or on other questions",
            kept="the checkpoint", fix="train with the settings of that run, or into another folder",
        )  # fmt: skip
    run.set_weights(found.of("weights"))
    found.restore(optimizer)
    return RerankerProgress(**found.described["kept"]), found.described["seconds"]
