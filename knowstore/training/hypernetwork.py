"""Meta-learning of the `tokens` hypernetwork by Eq. 5: the likelihood of the answer with the passage's expert mounted.

The blocks below the mount layer are frozen and see no expert, so their states are cached on disk; a step runs the
hypernetwork, the blocks from the mount layer up, and the output head at answer positions.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from knowstore.errors import TrainingError
from knowstore.experts.expert import Experts
from knowstore.experts.llm import FrozenLLM, pad_ids
from knowstore.experts.mount import mount
from knowstore.experts.tokens import TokensHypernetwork, pad_segments
from knowstore.prompts import answer_target, question_prompt
from knowstore.training.cache import StateCache
from knowstore.training.data import QuestionRow, TrainingData
from knowstore.training.start import analytic_start

_BUCKET = 16  # batches sorted by length together, so that little is padded
_MAX_QUESTION_TOKENS = 96
_BATCH_TOKENS = 4096  # of one forward pass that fills the cache


@dataclass(frozen=True)
class TrainingConfig:
    """How a hypernetwork is trained.

    The run ends after `minutes`, or after `steps` when that is given. The learning rate rises over `warmup` steps,
    then falls to a fiftieth by a cosine over the run. In the last
    `1 - mix_from` of the run a share `mix_share` of the questions gets distracting segments beside the right one,
    each with its relevance, as served. Weights are averaged with decay `average`. `n_held_out` questions, with the
    passages that they stand in, are kept out to validate.
    """

    minutes: float = 60.0
    batch_size: int = 40
    learning_rate: float = 8e-4
    weight_decay: float = 0.01
    warmup: int = 30
    max_gradient_norm: float = 1.0
    mix_from: float = 0.3
    mix_share: float = 0.5
    average: float = 0.995
    n_held_out: int = 200
    validate_every: int = 200
    checkpoint_every_s: float = 300.0
    seed: int = 0
    steps: int | None = None


@dataclass(frozen=True)
class TrainingProgress:
    """One line of the log; losses are nats per answer token, `gold` and `shuffled` on the questions kept out."""

    step: int
    seconds: float
    fraction: float
    loss: float
    gradient_norm: float
    gold: float | None = None
    shuffled: float | None = None


class _Run:
    """What a training run computes on: data as token ids, cached states, the modules."""

    def __init__(self, hypernetwork: TokensHypernetwork, llm: FrozenLLM, data: TrainingData, cache: Path) -> None:
        self.hypernetwork, self.llm, self.data = hypernetwork, llm, data
        self.layer = hypernetwork.config.layer
        self.prompts: list[tuple[list[int], int]] = []
        for row in data.questions:
            question = llm.prompt_ids(question_prompt(row.question))
            answer = llm.prompt_ids(answer_target(row.answers[0]), is_start=False)
            self.prompts.append(((question + answer)[:_MAX_QUESTION_TOKENS], len(question)))
        self.epoch, self.batches = -1, list[list[int]]()
        self.passages = [hypernetwork.tokenise(llm, passage) for passage in data.passages]
        self.question_states = StateCache(
            cache / "questions.bf16", [len(ids) for ids, _ in self.prompts], llm.width, self._questions
        )
        self.passage_states = StateCache(
            cache / "passages.bf16", [len(ids) for ids, _ in self.passages], llm.width, self._passages
        )

    def _questions(self, indices: list[int]) -> list[Tensor]:
        return self._states([self.prompts[i][0] for i in indices], 0)

    def _passages(self, indices: list[int]) -> list[Tensor]:
        return self._states([self.passages[i][0] for i in indices], 1)

    def _states(self, sequences: list[list[int]], which: int) -> list[Tensor]:
        """States of sequences in batches of similar length: 0 those that enter the block, 1 its FFN."""
        out: list[Tensor] = [torch.empty(0)] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        while order:
            n = max(1, _BATCH_TOKENS // len(sequences[order[-1]]))
            part, order = order[-n:], order[:-n]
            states = self.llm.states(pad_ids([sequences[index] for index in part]), self.layer)[which]
            for row, index in enumerate(part):
                out[index] = states[row, : len(sequences[index])]
        return out

    def neurons(self, segments: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Keys (S, D, T + 1) and values (S, T + 1, D) of segments given as (passage, sentence)."""
        states = self.passage_states.get([passage for passage, _ in segments])
        pieces, ids = [], []
        for (passage, sentence), x in zip(segments, states, strict=True):
            first, last = self.passages[passage][1][sentence]
            pieces.append(x[first:last])
            ids.append(torch.tensor(self.passages[passage][0][first:last], dtype=torch.long))
        network = self.hypernetwork
        batch = pad_segments(pieces, ids, network.const.device)
        with torch.no_grad():
            words = network.words(self.llm, batch.ids)
        with torch.autocast(batch.x.device.type, torch.bfloat16):
            latents = network.latents(batch, words)
            return network.neurons(latents, words, network.is_neuron(batch.ids, batch.mask))

    def loss(self, questions: Sequence[int], up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        """Eq. 5 for questions with their neurons mounted; mean over answer tokens."""
        llm, network = self.llm, self.hypernetwork
        ids = pad_ids([self.prompts[i][0] for i in questions]).to(llm.device)
        states = torch.zeros(*ids.shape, llm.width, dtype=torch.bfloat16)
        target = torch.full(tuple(ids.shape), -100)
        for row, (index, cached) in enumerate(zip(questions, self.question_states.get(questions), strict=True)):
            tokens, n_question = self.prompts[index]
            states[row, : len(cached)] = cached
            target[row, n_question : len(tokens)] = ids[row, n_question : len(tokens)].cpu()
        static = network.static
        assert static is not None
        experts = Experts(
            up=up.to(llm.device, llm.dtype),
            down=down.to(llm.device, llm.dtype),
            neuron_weights=weights.to(llm.device, llm.dtype),
            static=static.to(llm.device, llm.dtype),
            max_norm=network.config.max_norm,
        )
        with _plain_attention(llm), llm.upper(self.layer) as upper, mount(llm.model, experts, self.layer):
            final = upper(states.to(llm.device, llm.dtype))
        is_target = (target[:, 1:] != -100).to(llm.device)
        head = llm.model.get_output_embeddings()
        logits = head(final[:, :-1][is_target])
        return cross_entropy(logits.float(), target[:, 1:].to(llm.device)[is_target])

    @torch.no_grad()
    def validate(self, questions: Sequence[int], batch_size: int) -> tuple[float, float]:
        """Loss with the gold segment's neurons, and with those of another question's segment."""
        totals = []
        for shift in (0, len(questions) // 2):
            losses = []
            for first in range(0, len(questions), batch_size):
                part = questions[first : first + batch_size]
                others = [questions[(first + row + shift) % len(questions)] for row in range(len(part))]
                up, down = self.neurons([_gold(self.data.questions[i]) for i in others])
                losses.append(len(part) * self.loss(part, up, down, torch.ones(up.shape[0], up.shape[2])).item())
            totals.append(sum(losses) / len(questions))
        return totals[0], totals[1]

    def step_loss(self, questions: Sequence[int], draw: random.Random, mix_share: float) -> Tensor:
        """The training loss of one batch; a share of its questions gets distractors beside the right segment."""
        rows = [self.data.questions[i] for i in questions]
        gold = [_gold(row) for row in rows]
        siblings = []
        for row in rows:
            others = [s for s in range(len(self.data.passages[row.passage].spans)) if s != row.segment]
            others = [s for s in others if self.passages[row.passage][1][s][0] < self.passages[row.passage][1][s][1]]
            is_mixed = bool(others) and draw.random() < mix_share
            siblings.append((row.passage, draw.choice(others)) if is_mixed else None)
        extra = [sibling for sibling in siblings if sibling is not None]
        up, down = self.neurons(gold + extra)
        N, B = up.shape[2], len(rows)
        if not extra:
            return self.loss(questions, up, down, torch.ones(B, N))
        # three slots a question: the right segment, another of its passage, another question's
        sibling_rows, position = [], B
        for sibling in siblings:
            sibling_rows.append(position if sibling is not None else 0)
            position += sibling is not None
        stranger_rows = [(index + 1) % B for index in range(B)]
        weights = torch.zeros(B, 3)
        for index, sibling in enumerate(siblings):
            if sibling is None:
                weights[index, 0] = 1.0
            else:
                scores = torch.tensor([draw.gauss(2.0, 1.0), draw.gauss(0.0, 1.0), draw.gauss(-0.5, 1.0)])
                weights[index] = scores.softmax(0)
        order = torch.tensor([list(range(B)), sibling_rows, stranger_rows]).T  # (B, 3)
        mixed_up = up[order].permute(0, 2, 1, 3).flatten(2)  # (B, D, 3N)
        mixed_down = down[order].flatten(1, 2)  # (B, 3N, D)
        return self.loss(questions, mixed_up, mixed_down, weights.repeat_interleave(N, 1))


@contextmanager
def _plain_attention(llm: FrozenLLM) -> Iterator[None]:
    """Attention as plain products: on a CPU the fused kernel's backward takes a third of a step at these lengths."""
    before = llm.model.config._attn_implementation
    llm.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        llm.model.set_attn_implementation(before)


def _gold(row: QuestionRow) -> tuple[int, int]:
    return row.passage, row.segment


def train_tokens(
    hypernetwork: TokensHypernetwork,
    llm: FrozenLLM,
    data: TrainingData,
    config: TrainingConfig,
    folder: Path,
    *,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> TokensHypernetwork:
    """Train a `tokens` hypernetwork by Eq. 5 and return it with its averaged weights.

    The folder takes cached states, the log (`log.jsonl`) and a checkpoint from which the same call goes on.

    Raises:
        TrainingError: fewer questions than a batch, a checkpoint of another run, or a loss that is not finite;
            the last checkpoint stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(hypernetwork, llm, data, folder / "states")
    usable = [i for i, row in enumerate(data.questions) if _has_tokens(run, row)]
    draw = random.Random(config.seed)
    draw.shuffle(usable)
    held_out, train = ([i for i in part if _has_answer(run, i)] for part in _split(data, usable, config.n_held_out))
    if len(train) < config.batch_size:
        raise TrainingError(
            f"{len(train)} questions to train on, a batch takes {config.batch_size}",
            kept="nothing was trained", fix="give more questions or a smaller batch",
        )  # fmt: skip
    trained = {name: p for name, p in hypernetwork.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
    )
    checkpoint = folder / "checkpoint"
    step, seconds = 0, 0.0
    if (checkpoint / "run.json").exists():
        step, seconds, averaged = _resume(checkpoint, hypernetwork, optimizer, config)
    else:
        torch.manual_seed(config.seed)
        analytic_start(hypernetwork, llm, [run.prompts[i] for i in train[:3200]], data.passages)
        averaged = {name: p.detach().clone() for name, p in trained.items()}
    n_batches = len(train) // config.batch_size
    started, saved_at = time.monotonic() - seconds, time.monotonic()
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        while (fraction := _fraction(config, step, time.monotonic() - started)) < 1:
            epoch, position = divmod(step, n_batches)
            batch = _epoch_order(run, train, config, epoch)[position]
            rate = config.learning_rate * min(1, (step + 1) / config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate * (0.02 + 0.49 * (1 + math.cos(math.pi * fraction)))
            step_draw = random.Random(f"{config.seed}/{step}")
            optimizer.zero_grad()
            loss = run.step_loss(batch, step_draw, config.mix_share if fraction >= config.mix_from else 0.0)
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"the loss is {loss.item()} at step {step}", kept=f"the last checkpoint in {checkpoint}",
                    fix="run again with a lower learning rate",
                )  # fmt: skip
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(trained.values(), config.max_gradient_norm).item()
            optimizer.step()
            step += 1
            decay = min(config.average, step / (step + 20))
            with torch.no_grad():
                for name, parameter in trained.items():
                    averaged[name].lerp_(parameter, 1 - decay)
            gold = shuffled = None
            if held_out and step % config.validate_every == 0:
                with _OtherWeights(trained, averaged):
                    gold, shuffled = run.validate(held_out, config.batch_size)
            elapsed = time.monotonic() - started
            progress = TrainingProgress(step, elapsed, fraction, loss.item(), norm, gold, shuffled)
            log.write(json.dumps(asdict(progress)) + "\n")
            log.flush()
            if on_progress is not None:
                on_progress(progress)
            if time.monotonic() - saved_at >= config.checkpoint_every_s:
                _checkpoint(checkpoint, hypernetwork, averaged, optimizer, config, step, elapsed)
                saved_at = time.monotonic()
    _checkpoint(checkpoint, hypernetwork, averaged, optimizer, config, step, time.monotonic() - started)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(averaged[name])
    return hypernetwork


def _has_tokens(run: _Run, row: QuestionRow) -> bool:
    first, last = run.passages[row.passage][1][row.segment]
    return last > first


def _has_answer(run: _Run, question: int) -> bool:
    """Whether any token of the answer is left within the most tokens of a question."""
    ids, n_question = run.prompts[question]
    return len(ids) > n_question


def _fraction(config: TrainingConfig, step: int, seconds: float) -> float:
    """How much of the run is behind."""
    return seconds / (60 * config.minutes) if config.steps is None else step / config.steps


def _split(data: TrainingData, usable: list[int], n_held_out: int) -> tuple[list[int], list[int]]:
    """Questions kept out with their passages, and the questions of all other passages."""
    passages: set[int] = set()
    held_out: list[int] = []
    for index in usable:
        if len(held_out) >= n_held_out:
            break
        if data.questions[index].passage not in passages:
            passages.add(data.questions[index].passage)
            held_out.append(index)
    return held_out, [index for index in usable if data.questions[index].passage not in passages]


def _epoch_order(run: _Run, train: list[int], config: TrainingConfig, epoch: int) -> list[list[int]]:
    if run.epoch != epoch:
        draw = random.Random(f"{config.seed}/{epoch}")
        order = list(train)
        draw.shuffle(order)
        size = config.batch_size
        batches: list[list[int]] = []
        for first in range(0, len(order), size * _BUCKET):
            part = sorted(order[first : first + size * _BUCKET], key=lambda i: len(run.prompts[i][0]))
            batches += [part[i : i + size] for i in range(0, len(part) - size + 1, size)]
        draw.shuffle(batches)
        run.epoch, run.batches = epoch, batches
    return run.batches


class _OtherWeights:
    """Other weights in place for the time of a `with` block."""

    def __init__(self, trained: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
        self.trained, self.values = trained, values
        self.kept = {name: p.detach().clone() for name, p in trained.items()}

    def _copy(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(values[name])

    def __enter__(self) -> None:
        self._copy(self.values)

    def __exit__(self, *_: object) -> None:
        self._copy(self.kept)


def _checkpoint(
    folder: Path, hypernetwork: TokensHypernetwork, averaged: dict[str, Tensor], optimizer: torch.optim.Optimizer,
    config: TrainingConfig, step: int, seconds: float,
) -> None:  # fmt: skip
    """Weights, averages and optimiser state as safetensors, then `run.json`, which makes them count."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"weights/{name}": t.detach().contiguous() for name, t in hypernetwork.state_dict().items()}
    tensors |= {f"averaged/{name}": t.contiguous() for name, t in averaged.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(value).contiguous() for name, value in state.items()}
    name = f"step-{step}.safetensors"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name)
    temporary = folder / "run.json.new"
    temporary.write_text(
        json.dumps({"file": name, "step": step, "seconds": seconds, "config": asdict(config)}), "utf-8"
    )
    temporary.replace(folder / "run.json")
    for old in folder.glob("step-*.safetensors"):
        if old.name != name:
            old.unlink()


def _resume(
    folder: Path, hypernetwork: TokensHypernetwork, optimizer: torch.optim.Optimizer, config: TrainingConfig
) -> tuple[int, float, dict[str, Tensor]]:
    described: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    if TrainingConfig(**described["config"]) != config:
        raise TrainingError(
            f"{folder} holds a checkpoint of a run with other settings", kept="the checkpoint",
            fix="train with the settings of that run, or into another folder",
        )  # fmt: skip
    tensors = load_file(folder / described["file"])
    hypernetwork.load_state_dict(
        {k.removeprefix("weights/"): t for k, t in tensors.items() if k.startswith("weights/")}
    )
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    averaged = {k.removeprefix("averaged/"): t for k, t in tensors.items() if k.startswith("averaged/")}
    return described["step"], described["seconds"], averaged
