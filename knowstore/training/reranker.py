"""Contrastive training of the joint reranker by Eq. 8: the sentences that answer against those of hard negatives."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from knowstore.errors import TrainingError
from knowstore.retrieval.joint import UNREAD, JointConfig, JointModel, JointReranker
from knowstore.training.data import QuestionRow, TrainingData
from knowstore.training.steps import RerankerProgress, StepsConfig, keep_out, train_steps

Search = Callable[[str], Sequence[int]]
"""Gives the indices of the passages that a question finds, best first."""

_OF_ATTENTION = ".self.dropout"  # of the attention's weights, which a CPU cannot fuse with it
_BUCKET = 16  # batches sorted by length together, so that little is padded
_KEPT_SHARE = 0.95  # of the gold passages, by the null threshold
_EPSILON = 1e-6
_TEMPERATURES = torch.logspace(-1, 1, 201, dtype=torch.float64)


@dataclass(frozen=True)
class RerankerTrainingConfig(StepsConfig):
    """How a reranker is trained; see `StepsConfig`. `encoder_rate` and `head_rate` are the highest learning rates.

    `calibration_weight` weighs what makes a score of 0 mean as likely relevant as not, `word_weight` what tells the
    words of the answer within its passage. Without negatives the model learns where in a passage an answer stands and
    nothing of which passage holds it. `dropout` is the encoder's own, at every place where its architecture has one
    but the attention's weights; a run that sees its questions about once does without.
    """

    dropout: float = 0.0
    encoder_rate: float = 8e-5
    head_rate: float = 1e-3
    calibration_weight: float = 0.2
    word_weight: float = 0.5


@dataclass(frozen=True, eq=False)
class RerankerLosses:
    """Means over a batch: Eq. 8, what calibrates the passages' logits, and what tells the words of the answer."""

    contrast: Tensor
    calibration: Tensor
    words: Tensor


@dataclass(frozen=True, eq=False)
class Judged:
    """Sentence logits (C, S) of a question's candidates, the gold passage first; `gold` (S,) marks what answers."""

    logits: Tensor
    gold: Tensor


def mine(row: QuestionRow, data: TrainingData, search: Search, n: int, kept_out: Collection[int] = ()) -> list[int]:
    """The first `n` passages that a search finds and that hold none of a question's answers.

    Args:
        row: the question.
        search: gives indices of `data.passages`, best first.
        n: how many at most.
        kept_out: passages that may not be taken.
    """
    answers = [answer.lower() for answer in row.answers]
    found = dict.fromkeys(index for index in search(row.question) if index != row.passage and index not in kept_out)
    wrong = [i for i in found if not any(answer in data.passages[i].text.lower() for answer in answers)]
    return wrong[:n]


def train_reranker(
    model: JointModel,
    data: TrainingData,
    search: Search | None,
    config: RerankerTrainingConfig,
    folder: Path,
    *,
    base: str = "default",
    start: JointConfig | None = None,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[RerankerProgress], None] | None = None,
) -> tuple[JointReranker, RerankerProgress]:
    """Train a model by Eq. 8 and calibrate it on questions that are kept out.

    The loss is -log(sum of exp over the gold passage's sentences that hold the answer / sum of exp over all
    sentences of all candidates), plus softplus(-z) of the gold passage's logit z and softplus(z) of the others',
    plus the mean over the answer's word pieces of -log softmax of their logits within the gold passage.
    The encoder's embeddings stay as they are. The folder takes the log (`log.jsonl`) and a checkpoint from which
    the same call goes on.

    Args:
        model: the encoder and its head, trained in place.
        data: questions and their passages.
        search: finds passages among `data.passages`, from which hard negatives are taken; None without negatives.
        config: how to train.
        folder: for log and checkpoint.
        base: reference of the encoder, for the reranker's config.
        start: config of the trained reranker that the model is, None for a new one.
        dtype: what matrix products are computed in, the weights staying in float32; bfloat16 only where the device
            computes in it, elsewhere it takes several times as long.
        on_progress: called after every step.

    Returns: the reranker, and the log's line of the last step with how good that is on the questions kept out.

    Raises:
        TrainingError: fewer questions than a batch, no other passage or no search for it, a run without a step, a
            checkpoint of another run, or a loss that is not finite; the last checkpoint stays.
    """
    run = _Run(model, data, search, config, 0 if start is None else start.trained_steps, dtype)
    if len(run.train) < config.batch_size or len(data.passages) < 2 or (config.n_negatives and search is None):
        raise TrainingError(
            f"{len(run.train)} questions on {len(data.passages)} passages to train on, a batch takes "
            f"{config.batch_size}",
            kept="nothing was trained", fix="give more questions or a smaller batch",
        )  # fmt: skip
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in trained.items() if not name.startswith("head.")], "base": config.encoder_rate},
            {"params": list(model.head.parameters()), "base": config.head_rate},
        ],
        weight_decay=config.weight_decay,
    )
    made_with = {
        "base": model.base.digest, "config": asdict(config), "start": None if start is None else asdict(start),
        "data": data.fingerprint(),
    }  # fmt: skip
    kept = train_steps(run, config, optimizer, made_with, folder, on_progress)
    threshold, temperature = calibrate(run.judged)
    described = JointConfig(
        base_digest=model.base.digest,
        base=base,
        n_shared=model.base.n_shared,
        max_tokens=model.max_tokens,
        null_threshold=threshold if config.n_negatives else None,
        temperature=temperature,
        word_temperature=calibrate_words(run.words()),
        trained_steps=kept.step + (0 if start is None else start.trained_steps),
    )
    return JointReranker(model, described, dtype), kept


@torch.no_grad()
def judge(
    model: JointModel, data: TrainingData, search: Search, questions: Sequence[int], n_candidates: int = 6
) -> list[Judged]:
    """Score questions' gold passages among what a search finds, for `accuracies` and `calibrate`.

    Questions whose answer lies behind the model's `max_tokens` are left out.
    """
    config = RerankerTrainingConfig(n_held_out=0, n_mined=n_candidates - 1, n_candidates=n_candidates)
    run = _Run(model, data, search, config)
    return run.judge([index for index in questions if run.gold(index)])


def accuracies(judged: Sequence[Judged]) -> tuple[float, float | None]:
    """How often the gold passage's best sentence answers, and how often that passage comes first among several."""
    sentence = [bool(one.gold[one.logits[0].argmax()]) for one in judged]
    if all(len(one.logits) == 1 for one in judged):
        return sum(sentence) / len(judged), None
    first = [int(torch.logsumexp(one.logits, 1).argmax()) == 0 for one in judged]
    return sum(sentence) / len(judged), sum(first) / len(judged)


def calibrate(judged: Sequence[Judged]) -> tuple[float | None, float]:
    """The score (at that temperature) that 95 % of the gold passages reach, and the temperature under which answers are
    likeliest.

    What is made likely is the weight that the answering sentences get when all candidates are mounted: the passage's
    relevance (Eq. 9) times their share within it.

    Returns: null threshold and temperature; None and 1 when nothing was judged.
    """
    if not judged:
        return None, 1.0
    losses = torch.zeros_like(_TEMPERATURES)
    for one in judged:
        logits = one.logits.double() / _TEMPERATURES[:, None, None]  # (K, C, S)
        relevance = torch.logsumexp(logits, 2).log_softmax(1)[:, 0]
        losses -= relevance + torch.logsumexp(logits[:, 0].log_softmax(1)[:, one.gold], 1)
    temperature = _TEMPERATURES[losses.argmin()].item()
    scores = torch.stack([torch.logsumexp(one.logits[0].double() / temperature, 0) for one in judged])
    return torch.quantile(scores, 1 - _KEPT_SHARE).item(), temperature


def calibrate_words(words: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The temperature under which the words that answer are likeliest to be on and all others of their sentence off, a
    word being on with the probability that is its share: exp((its logit - the best one's) / temperature), see
    `word_relevance`.

    Args:
        words: of each question the logits (T,) of its gold sentence's word pieces, and which of them answer.

    Returns: the temperature at which the mean of both halves' log-likelihoods is highest; 1 for no questions.
    """
    losses = torch.zeros_like(_TEMPERATURES)
    for logits, is_answer in words:
        over = (logits - logits.max()).double()[None] / _TEMPERATURES[:, None]  # (K, T)
        on = over.exp().clamp(_EPSILON, 1 - _EPSILON)
        losses -= on[:, is_answer].log().mean(1)
        if not is_answer.all():
            losses -= (1 - on[:, ~is_answer]).log().mean(1)
    return _TEMPERATURES[losses.argmin()].item() if words else 1.0


class _Run:
    """What a training run computes on: questions and passages as token ids, and their hard negatives."""

    def __init__(
        self,
        model: JointModel,
        data: TrainingData,
        search: Search | None,
        config: RerankerTrainingConfig,
        steps_before: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.data, self.search, self.config = model, data, search, config
        self.steps_before, self.dtype = steps_before, dtype
        for name, module in model.enc.named_modules():
            if isinstance(module, nn.Dropout) and not name.endswith(_OF_ATTENTION):
                module.p = config.dropout
        self.questions = model.read_questions([row.question for row in data.questions])
        self.passages = model.read_passages([(one.title, one.text, one.spans) for one in data.passages])
        self._negatives: dict[int, list[int]] = {}
        self._epoch, self._batches = -1, list[list[int]]()
        order = [index for index in range(len(data.questions)) if self.gold(index)]
        random.Random(config.seed).shuffle(order)
        self.held_out, self.kept_out = keep_out(order, config, data)
        self.judged: list[Judged] = []
        self.train = [index for index in order if data.questions[index].passage not in self.kept_out]

    @property
    def module(self) -> nn.Module:
        """See `Stepped`."""
        return self.model

    def weights(self) -> Mapping[str, Tensor]:
        """See `Stepped`."""
        return self.model.weights()

    def set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Stepped`."""
        self.model.set_weights(tensors)

    def step_loss(self, step: int, draw: random.Random) -> tuple[Tensor, float]:
        """See `Stepped`."""
        config = self.config
        if config.dropout:
            torch.manual_seed(draw.getrandbits(63))
        losses = self.losses(self.batch(step), draw)
        further = config.calibration_weight * losses.calibration + config.word_weight * losses.words
        return losses.contrast + further, losses.contrast.item()

    def validate(self) -> tuple[float | None, float | None]:
        """See `Stepped`; `judged` is what it was found by."""
        self.judged = self.judge()
        return accuracies(self.judged)

    def gold(self, question: int) -> list[int]:
        """The sentences of the gold passage that hold the answer and are read beside the question."""
        row = self.data.questions[question]
        passage = self.data.passages[row.passage]
        read = self.model.sentences_read(self.questions[question], self.passages[row.passage])
        return [s for s in sorted(read) if row.answers[0] in passage.text[slice(*passage.spans[s])]]

    def answer_pieces(self, question: int) -> list[int]:
        """The word pieces of the gold passage's tokens that are read and stand in the answer, wherever its gold
        sentences state it."""
        row = self.data.questions[question]
        passage, tokens = self.data.passages[row.passage], self.passages[row.passage]
        n_read = self.model.max_tokens - len(self.questions[question]) - 3
        stated = []
        for sentence in self.gold(question):
            start, end = passage.spans[sentence]
            while (start := passage.text.find(row.answers[0], start, end)) >= 0:
                stated.append((start, start + len(row.answers[0])))
                start += 1
        return [
            place
            for place, (first, last) in enumerate(tokens.spans[:n_read])
            if tokens.sentences[place] >= 0 and any(first < end and start < last for start, end in stated)
        ]

    def negatives(self, question: int, n: int) -> list[int]:
        """Hard negatives of a question; only such of a question to train on are out of what is kept out."""
        if self.search is None:
            return []
        if question not in self._negatives:
            row = self.data.questions[question]
            kept_out = () if row.passage in self.kept_out else self.kept_out
            self._negatives[question] = mine(row, self.data, self.search, n, kept_out)
        return self._negatives[question]

    def batch(self, step: int) -> list[int]:
        """The questions of a step; an epoch's order depends on the seed and the steps that the model had before alone,
        so that a run that goes on from another does not begin with the questions that the other saw."""
        size = self.config.batch_size
        epoch, position = divmod(step, len(self.train) // size)
        if epoch != self._epoch:
            before = f"/{self.steps_before}" if self.steps_before else ""
            draw = random.Random(f"{self.config.seed}{before}/{epoch}")
            order = list(self.train)
            draw.shuffle(order)
            batches: list[list[int]] = []
            for first in range(0, len(order), size * _BUCKET):
                part = sorted(order[first : first + size * _BUCKET], key=self._length)
                batches += [part[i : i + size] for i in range(0, len(part) - size + 1, size)]
            draw.shuffle(batches)
            self._epoch, self._batches = epoch, batches
        return self._batches[position]

    def losses(self, questions: Sequence[int], draw: random.Random) -> RerankerLosses:
        """The losses of B questions."""
        n = self.config.n_negatives
        pairs = []
        for index in questions:
            gold = self.data.questions[index].passage
            candidates = (gold, *self._drawn(index, n, draw))
            pairs += [(self.questions[index], self.passages[passage]) for passage in candidates]
        batch = self.model.batch(pairs)
        tokens = self.model.token_logits(batch, self.dtype)  # (B (1 + n), T)
        logits = self.model.sentence_logits(batch, tokens).view(len(questions), 1 + n, -1)  # (B, 1 + n, S)
        is_gold = torch.zeros_like(logits, dtype=torch.bool)
        is_word = torch.zeros(len(questions), tokens.shape[1], dtype=torch.bool)  # (B, T)
        for row, index in enumerate(questions):
            is_gold[row, 0, self.gold(index)] = True
            is_word[row, [batch.firsts[row * (1 + n)] + place for place in self.answer_pieces(index)]] = True
        answers = torch.logsumexp(logits.masked_fill(~is_gold, UNREAD).flatten(1), 1)
        contrast = (torch.logsumexp(logits.flatten(1), 1) - answers).mean()
        passages = torch.logsumexp(logits, 2)  # (B, 1 + n)
        calibration = passages.new_zeros(())
        if n:
            calibration = softplus(-passages[:, 0]).mean() + softplus(passages[:, 1:]).mean()
        is_word = is_word.to(tokens.device)
        within = (passages[:, :1] - tokens[:: 1 + n]).masked_fill(~is_word, 0.0).sum(1)  # (B,)
        return RerankerLosses(contrast, calibration, (within / is_word.sum(1).clamp(min=1)).mean())

    @torch.no_grad()
    def judge(self, questions: Sequence[int] | None = None) -> list[Judged]:
        """Score the questions that are kept out, or those that are given."""
        self.model.eval()
        judged = []
        for index in self.held_out if questions is None else questions:
            gold = self.data.questions[index].passage
            candidates = [gold, *self.negatives(index, self.config.n_candidates - 1)]
            pairs = [(self.questions[index], self.passages[passage]) for passage in candidates]
            logits = self.model(self.model.batch(pairs), self.dtype).cpu()  # (C, S)
            is_gold = torch.zeros(logits.shape[1], dtype=torch.bool)
            is_gold[self.gold(index)] = True
            judged.append(Judged(logits, is_gold))
        return judged

    @torch.no_grad()
    def words(self) -> list[tuple[Tensor, Tensor]]:
        """Of each question that is kept out the logits of its gold sentence's word pieces, and which of them answer."""
        self.model.eval()
        found = []
        for index in self.held_out:
            batch = self.model.batch([(self.questions[index], self.passages[self.data.questions[index].passage])])
            logits = self.model.token_logits(batch, self.dtype)[0].cpu()
            is_answer = torch.zeros(len(logits), dtype=torch.bool)
            is_answer[[batch.firsts[0] + place for place in self.answer_pieces(index)]] = True
            is_gold = torch.isin(batch.sentences[0].cpu(), torch.tensor(self.gold(index)[:1]))
            if (is_answer & is_gold).any():
                found.append((logits[is_gold], is_answer[is_gold]))
        return found

    def _length(self, question: int) -> int:
        return self.model.n_tokens(self.questions[question], self.passages[self.data.questions[question].passage])

    def _drawn(self, question: int, n: int, draw: random.Random) -> list[int]:
        """`n` negatives: mined ones, else any other passages that are not kept out."""
        mined = self.negatives(question, self.config.n_mined)
        drawn = draw.sample(mined, min(n, len(mined)))
        gold, n_passages = self.data.questions[question].passage, len(self.data.passages)
        while len(drawn) < n:
            other = draw.randrange(n_passages)
            if other != gold and (other not in self.kept_out or len(self.kept_out) >= n_passages - 1):
                drawn.append(other)
        return drawn
