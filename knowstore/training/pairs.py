"""Fine-tuning of published rerankers of pairs by Eq. 8: the passage that answers against hard negatives."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from knowstore.errors import TrainingError
from knowstore.retrieval import PairModel
from knowstore.retrieval.pairs import Pair
from knowstore.training.checkpoints import read_checkpoint, write_checkpoint
from knowstore.training.data import TrainingData
from knowstore.training.extent import fraction_done, n_kept_out, no_steps
from knowstore.training.reranker import RerankerProgress, Search, mine


@dataclass(frozen=True)
class PairTrainingConfig:
    """How a reranker of pairs is fine-tuned.

    The run ends after `minutes`, or after `steps` when that is given. The learning rate rises over `warmup` steps and
    falls linearly over the run. A question comes with its own passage and `n_negatives` of the `n_mined` best passages
    that a search finds and that do not answer it, or any others where those are too few. `n_held_out` questions (a
    tenth of them and at most 200 when None), with the passages that they stand in, are kept out to validate, each among
    `n_candidates` passages.
    """

    minutes: float = 60.0
    batch_size: int = 4
    n_negatives: int = 7
    n_mined: int = 15
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    warmup: int = 50
    max_gradient_norm: float = 1.0
    n_held_out: int | None = None
    n_candidates: int = 8
    validate_every: int = 300
    checkpoint_every_s: float = 300.0
    seed: int = 0
    steps: int | None = None


def train_pairs(
    model: PairModel,
    data: TrainingData,
    search: Search,
    config: PairTrainingConfig,
    folder: Path,
    *,
    base_digest: str = "",
    is_bfloat16: bool = False,
    on_progress: Callable[[RerankerProgress], None] | None = None,
) -> RerankerProgress:
    """Fine-tune a reranker in place by Eq. 8.

    The loss is the mean over questions of -log(exp s(q, gold) / sum of exp s(q, c) over its candidates c), which are
    the gold passage and the negatives. The folder takes the log (`log.jsonl`) and a checkpoint from which the same call
    goes on.

    Args:
        model: what is trained, as it was read.
        data: questions and their passages.
        search: finds passages among `data.passages`, from which hard negatives are taken.
        config: how to train.
        folder: for log and checkpoint.
        base_digest: identifies the weights that it starts from; a checkpoint of others is refused.
        is_bfloat16: compute matrix products in bfloat16, the weights staying in float32.
        on_progress: called after every step.

    Returns: the log's line of the last step with how good that is on the questions kept out.

    Raises:
        TrainingError: fewer questions than a batch, no negatives, a run without a step, a checkpoint of another run, or
            a loss that is not finite; the last checkpoint stays.
    """
    run = _Run(model, data, search, config, is_bfloat16)
    if len(run.train) < config.batch_size or len(data.passages) < 2 or config.n_negatives < 1:
        raise TrainingError(
            f"{len(run.train)} questions on {len(data.passages)} passages with {config.n_negatives} negatives to train "
            f"on, a batch takes {config.batch_size} and a question one negative",
            kept="nothing was trained", fix="give more questions, more negatives or a smaller batch",
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    trained = model.trained
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, weight_decay=config.weight_decay)
    made_with: dict[str, object] = {
        "base": base_digest, "config": asdict(config), "trained": sorted(trained), "data": data.fingerprint(),
    }  # fmt: skip
    kept, seconds = _resume(folder / "checkpoint", model, optimizer, made_with)
    started, saved_at = time.monotonic() - seconds, time.monotonic()

    def fraction(step: int) -> float:
        if config.steps is not None:
            return fraction_done(step, config.steps)
        return fraction_done(time.monotonic() - started, 60 * config.minutes)

    def keep(progress: RerankerProgress) -> None:
        described = {"kept": asdict(progress), "seconds": time.monotonic() - started, "made_with": made_with}
        weights = {f"weights/{name}": tensor for name, tensor in trained.items()}
        write_checkpoint(folder / "checkpoint", progress.step, described, weights, optimizer)

    step = 0 if kept is None else kept.step
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        while (done := fraction(step)) < 1:
            rate = config.learning_rate * min(1, (step + 1) / max(config.warmup, 1)) * (0.03 + 0.97 * (1 - done))
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.model.train()
            loss = run.loss(run.batch(step), random.Random(f"{config.seed}/{step}"))
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"the loss is {loss.item()} at step {step}", kept=f"the last checkpoint in {folder}",
                    fix="run again with a lower learning rate",
                )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(trained.values(), config.max_gradient_norm).item()
            optimizer.step()
            step += 1
            is_due = fraction(step) >= 1 or step % config.validate_every == 0
            first = run.gold_first() if run.held_out and is_due else None
            kept = RerankerProgress(step, time.monotonic() - started, done, loss.item(), norm, gold_first=first)
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
    if run.held_out and kept.gold_first is None:  # the time ran out between two steps
        kept = replace(kept, gold_first=run.gold_first())
    model.model.eval()
    return kept


def _resume(
    folder: Path, model: PairModel, optimizer: torch.optim.Optimizer, made_with: dict[str, object]
) -> tuple[RerankerProgress | None, float]:
    """Take up a checkpoint, if there is one; gives its last step's line of the log, and the seconds of the run."""
    found = read_checkpoint(folder)
    if found is None:
        return None, 0.0
    if found.described.get("made_with") != made_with:
        raise TrainingError(
            f"{folder} holds a checkpoint of a run with other settings or from another reranker, or on other questions",
            kept="the checkpoint", fix="train with the settings of that run, or into another folder",
        )  # fmt: skip
    model.model.load_state_dict(found.of("weights"), strict=False)
    found.restore(optimizer)
    return RerankerProgress(**found.described["kept"]), found.described["seconds"]


class _Run:
    """Questions with their candidates, and what the model makes of them."""

    def __init__(
        self, model: PairModel, data: TrainingData, search: Search, config: PairTrainingConfig, is_bfloat16: bool
    ) -> None:
        self.model, self.data, self.search, self.config, self.is_bfloat16 = model, data, search, config, is_bfloat16
        self._mined: dict[int, list[int]] = {}
        order = list(range(len(data.questions)))
        random.Random(config.seed).shuffle(order)
        self.held_out: list[int] = []
        self.kept_out: set[int] = set()
        for index in order:
            passage = data.questions[index].passage
            if len(self.held_out) < n_kept_out(config.n_held_out, data) and passage not in self.kept_out:
                self.kept_out.add(passage)
                self.held_out.append(index)
        self.train = [index for index in order if data.questions[index].passage not in self.kept_out]
        others = [passage for passage in range(len(data.passages)) if passage not in self.kept_out]
        self.others: Sequence[int] = others if len(others) > 1 else range(len(data.passages))

    def batch(self, step: int) -> list[int]:
        """The questions of a step; an epoch's order depends on the seed alone."""
        size = self.config.batch_size
        epoch, position = divmod(step, len(self.train) // size)
        order = list(self.train)
        random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
        return order[position * size : (position + 1) * size]

    def loss(self, questions: Sequence[int], draw: random.Random) -> Tensor:
        """Eq. 8 of B questions."""
        pairs = [pair for question in questions for pair in self._pairs(question, self._negatives(question, draw))]
        logits = self._logits(pairs).view(len(questions), -1)  # (B, 1 + n), the gold passage first
        return cross_entropy(logits, torch.zeros(len(questions), dtype=torch.long, device=logits.device))

    @torch.no_grad()
    def gold_first(self) -> float:
        """How often the gold passage of a question that was kept out comes first among its candidates."""
        self.model.model.eval()
        first = 0
        for question in self.held_out:
            wrong = self._mine(question)[: self.config.n_candidates - 1]
            first += int(self._logits(self._pairs(question, wrong)).argmax()) == 0
        return first / len(self.held_out)

    def _logits(self, pairs: Sequence[Pair]) -> Tensor:
        with torch.autocast(self.model.model.device.type, torch.bfloat16, enabled=self.is_bfloat16):
            return self.model.logits(pairs)

    def _pairs(self, question: int, negatives: Sequence[int]) -> list[Pair]:
        """The question with its own passage and with others, each with its title as it is served."""
        row = self.data.questions[question]
        passages = [self.data.passages[index] for index in (row.passage, *negatives)]
        return [(row.question, f"{one.title}\n{one.text}" if one.title else one.text) for one in passages]

    def _negatives(self, question: int, draw: random.Random) -> list[int]:
        """Hard negatives; where there are too few, any other passages to train on."""
        mined, n = self._mine(question)[: self.config.n_mined], self.config.n_negatives
        drawn = draw.sample(mined, min(n, len(mined)))
        gold = self.data.questions[question].passage
        others = [passage for passage in self.others if passage != gold]
        return drawn + draw.choices(others, k=n - len(drawn))

    def _mine(self, question: int) -> list[int]:
        """What is found and does not answer; of what is kept out, only for a question that is kept out as well."""
        if question not in self._mined:
            row = self.data.questions[question]
            n = max(self.config.n_mined, self.config.n_candidates - 1)
            kept_out = () if row.passage in self.kept_out else self.kept_out
            self._mined[question] = mine(row, self.data, self.search, n, kept_out)
        return self._mined[question]
