"""Fine-tuning of published rerankers of pairs by Eq. 8: the passage that answers against hard negatives."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from knowstore.errors import TrainingError
from knowstore.retrieval import PairModel
from knowstore.retrieval.pairs import Pair
from knowstore.training.data import TrainingData
from knowstore.training.reranker import Search, mine
from knowstore.training.steps import RerankerProgress, StepsConfig, keep_out, train_steps


@dataclass(frozen=True)
class PairTrainingConfig(StepsConfig):
    """How a reranker of pairs is fine-tuned, with `learning_rate` as the highest; see `StepsConfig`. Where a question
    has too few negatives, any other passages take their place."""

    batch_size: int = 4
    n_negatives: int = 7
    n_mined: int = 15
    learning_rate: float = 2e-5
    max_gradient_norm: float = 1.0
    n_candidates: int = 8


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
    trained = model.trained
    optimizer = torch.optim.AdamW(
        [{"params": list(trained.values()), "base": config.learning_rate}], weight_decay=config.weight_decay
    )
    made_with = {
        "base": base_digest, "config": asdict(config), "trained": sorted(trained), "data": data.fingerprint(),
    }  # fmt: skip
    return train_steps(run, config, optimizer, made_with, folder, on_progress)


class _Run:
    """Questions with their candidates, and what the model makes of them."""

    def __init__(
        self, model: PairModel, data: TrainingData, search: Search, config: PairTrainingConfig, is_bfloat16: bool
    ) -> None:
        self.model, self.data, self.search, self.config, self.is_bfloat16 = model, data, search, config, is_bfloat16
        self._mined: dict[int, list[int]] = {}
        self._epoch, self._order = -1, list[int]()
        order = list(range(len(data.questions)))
        random.Random(config.seed).shuffle(order)
        self.held_out, self.kept_out = keep_out(order, config, data)
        self.train = [index for index in order if data.questions[index].passage not in self.kept_out]
        others = [passage for passage in range(len(data.passages)) if passage not in self.kept_out]
        self.others: Sequence[int] = others if len(others) > 1 else range(len(data.passages))

    @property
    def module(self) -> nn.Module:
        """See `Stepped`."""
        module: nn.Module = self.model.model
        return module

    def weights(self) -> Mapping[str, Tensor]:
        """See `Stepped`."""
        return self.model.trained

    def set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Stepped`."""
        self.model.model.load_state_dict(tensors, strict=False)

    def step_loss(self, step: int, draw: random.Random) -> tuple[Tensor, float]:
        """See `Stepped`."""
        torch.manual_seed(draw.getrandbits(63))  # of the model's own dropout
        loss = self.loss(self.batch(step), draw)
        return loss, loss.item()

    def validate(self) -> tuple[None, float]:
        """See `Stepped`."""
        return None, self.gold_first()

    def batch(self, step: int) -> list[int]:
        """The questions of a step; an epoch's order depends on the seed alone."""
        size = self.config.batch_size
        epoch, position = divmod(step, len(self.train) // size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(self.train)
            random.Random(f"{self.config.seed}/{epoch}").shuffle(self._order)
        return self._order[position * size : (position + 1) * size]

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
        if len(drawn) == n:
            return drawn
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
