"""What one training step of a hypernetwork computes: data as token ids, and the losses on a batch."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from knowstore.config import GenerationConfig, RetrievalConfig
from knowstore.evaluation import exact_match, token_f1
from knowstore.experts.expert import Experts, word_weights
from knowstore.experts.generation import Prompt, generate
from knowstore.experts.hypernetwork import Hypernetwork
from knowstore.experts.llm import FrozenLLM, pad_ids
from knowstore.experts.mount import mount
from knowstore.experts.tokens import Tokenised, TokensHypernetwork
from knowstore.prompts import answer_target, question_prompt
from knowstore.retrieval import Reranker, RerankItem, relevance, word_relevance
from knowstore.training.data import QuestionRow, TrainingData
from knowstore.training.losses import Pointers, pointers, pointing_accuracy, pointing_loss, silence_loss
from knowstore.training.signals import (
    AnswerSteps,
    Signals,
    contrast_loss,
    distillation_loss,
    held,
    nothing_loss,
    without_passages,
)

_MAX_QUESTION_TOKENS = 96
_KNOWN_SHARE = 0.1  # of the questions, in Eq. 5: all relevance on the sentence that answers
_WORDS_SHARE = 0.85  # of the others: relevance of words, as served by default; else of sentences
_N_ALIKE = 4  # passages of one title that are trained together
_BUCKET = 256  # passages sorted by length together, so that little is padded
N_OPENING = 4  # tokens of a passage that are given,
_N_COMPLETED = 44  # and most that are completed behind them


@dataclass(frozen=True)
class PreparedQuestion:
    """A question in token ids, its answer behind it: `n_question` of them ask, `starts` are the passage's tokens at
    which the answer stands, `sentence` is the position of the sentence of the first."""

    ids: list[int]
    n_question: int
    starts: list[int]
    sentence: int

    @property
    def n_steps(self) -> int:
        """Tokens of the answer, its end included."""
        return len(self.ids) - self.n_question


@dataclass(frozen=True)
class Losses:
    """Of one batch; `answer` is None where Eq. 5 was not computed, `pointing` and `silence` of a kind that does not
    point are. `signals` are those of `signals.py` that are on, by name, each with its weight."""

    answer: Tensor | None
    pointing: Tensor | None = None
    silence: Tensor | None = None
    accuracy: float | None = None
    signals: Mapping[str, tuple[float, Tensor]] = field(default_factory=dict)

    def total(self, pointing_weight: float, silence_weight: float) -> Tensor:
        """Their weighted sum; silence counts as a part of pointing."""
        parts = [] if self.answer is None else [self.answer]
        if self.pointing is not None and self.silence is not None:
            parts.append(pointing_weight * (self.pointing + silence_weight * self.silence))
        parts += [weight * value for weight, value in self.signals.values()]
        return torch.stack(parts).sum()

    def said(self) -> dict[str, float]:
        """What `TrainingProgress` says of them."""
        found = {"answer": None if self.answer is None else self.answer.item(), "accuracy": self.accuracy}
        found |= {name: value.item() for name, (_, value) in self.signals.items()}
        return {name: value for name, value in found.items() if value is not None}


class Batch:
    """Passages with all their questions: `rows` are (position in `passages`, question)."""

    def __init__(self, passages: Sequence[int], questions: Sequence[Sequence[int]]) -> None:
        self.passages = list(passages)
        self.rows = [(position, question) for position, some in enumerate(questions) for question in some]


@dataclass(frozen=True)
class Given:
    """What a batch's questions are validated with: experts, and the passages that stand before each, or ""."""

    experts: Experts
    before: tuple[str, ...]


class Run(ABC):
    """Data, models and the losses of one batch, for one kind of hypernetwork.

    Attributes:
        questions: in token ids, by index in the data; those that cannot be trained on are left out.
        by_passage: the questions of each passage.
        lengths: of each passage, in the tokens that its expert is made from.
        reranker: what weighs experts in Eq. 5, where one does.
        beside: the run of the hypernetwork whose experts are mounted beside what is trained, where one is.
        signals: what is trained by beside Eq. 5.
        has_hard_negatives: whether passages of one title are trained together.
    """

    network: Hypernetwork
    llm: FrozenLLM
    data: TrainingData
    questions: dict[int, PreparedQuestion]
    by_passage: dict[int, list[int]]
    lengths: list[int]
    reranker: Reranker | None = None
    beside: TokensRun | None = None
    signals: Signals = Signals()
    has_hard_negatives: bool = False

    def prepare(
        self, data: TrainingData, n_per_passage: int, prepared: Callable[[QuestionRow], PreparedQuestion | None]
    ) -> None:
        """Keep the data and fill `questions` and `by_passage`, with at most so many questions of a passage."""
        self.data = data
        self.questions, self.by_passage = {}, {}
        for index, row in enumerate(data.questions):
            if len(self.by_passage.get(row.passage, ())) < n_per_passage and (found := prepared(row)) is not None:
                self.questions[index] = found
                self.by_passage.setdefault(row.passage, []).append(index)

    def train_on(self, passages: Sequence[int]) -> None:
        """Be told which passages are trained on; the others are kept out."""
        del passages

    @abstractmethod
    def losses(self, batch: Batch, draw: random.Random, *, is_answering: bool) -> Losses:
        """All losses of a batch; Eq. 5 only when `is_answering`, for it runs the blocks above the mount layer."""

    @abstractmethod
    def static_loss(self, batch: Batch) -> Tensor:
        """Eq. 5 with what belongs to no passage alone."""

    @abstractmethod
    def validated(self, batch: Batch, *, is_own: bool) -> Given:
        """For each question what its passage gives at its best, or what another passage does."""

    @torch.no_grad()
    def answer_nats(self, batch: Batch, given: Given) -> float:
        """Eq. 5 under what is given, in nats per answer token."""
        questions = [self.questions[question] for _, question in batch.rows]
        ids = pad_ids([question.ids for question in questions]).to(self.llm.device)
        with mount(self.llm.model, given.experts, self.network.config.layer):
            return float(self.answer_loss(questions, ids))

    def scores(self, batch: Batch, given: Given) -> list[tuple[float, float]]:
        """EM and F1 of the answer that is generated to each question under what is given, greedily and to its end."""
        rows = [self.data.questions[question] for _, question in batch.rows]
        prompts = [
            Prompt(before, question_prompt(row.question)) for before, row in zip(given.before, rows, strict=True)
        ]
        texts = generate(self.llm, prompts, given.experts, self.network.config.layer, GenerationConfig())
        return [
            (exact_match(one.text, row.answers), token_f1(one.text, row.answers))
            for one, row in zip(texts, rows, strict=True)
        ]

    def batches(
        self, passages: Sequence[int], seed: str, n_pieces: int, n_questions: int, *, is_plain: bool = True
    ) -> list[Batch]:
        """One epoch: passages of similar length together, at most so many word pieces and questions a batch; when it is
        not `is_plain`, up to four of one title are kept together."""
        draw = random.Random(seed)
        order = list(passages)
        draw.shuffle(order)
        groups = [[passage] for passage in order] if is_plain else self._of_one_title(order)
        out: list[list[int]] = []
        for first in range(0, len(groups), _BUCKET):
            part = sorted(groups[first : first + _BUCKET], key=lambda group: max(self.lengths[p] for p in group))
            batch: list[int] = []
            for passage in (passage for group in part for passage in group):
                n_asked = sum(len(self.by_passage[p]) for p in [*batch, passage])
                padded = (len(batch) + 1) * max(self.lengths[p] for p in [*batch, passage])
                if len(batch) > 1 and (padded > n_pieces or n_asked > n_questions):
                    out.append(batch)
                    batch = []
                batch.append(passage)
            if len(batch) > 1:
                out.append(batch)
        draw.shuffle(out)
        return [Batch(batch, [self.by_passage[p] for p in batch]) for batch in out]

    def _of_one_title(self, order: Sequence[int]) -> list[list[int]]:
        """Passages of one title in groups of up to four of similar length, those without a title each alone."""
        by_title: dict[str | int, list[int]] = {}
        for passage in order:
            by_title.setdefault(self.data.passages[passage].title or passage, []).append(passage)
        groups = []
        for some in by_title.values():
            some.sort(key=lambda p: self.lengths[p])
            groups += [some[first : first + _N_ALIKE] for first in range(0, len(some), _N_ALIKE)]
        return groups

    def others(self, batch: Batch, n: int) -> list[list[int]]:
        """For each passage of a batch up to `n` other positions: the next ones, with `has_hard_negatives` first those
        of its title."""
        out, size = [], len(batch.passages)
        titles = [self.data.passages[passage].title for passage in batch.passages]
        for own, title in enumerate(titles):
            rest = [(own + k) % size for k in range(1, size)]
            if self.has_hard_negatives and title:
                rest.sort(key=lambda position, title=title: titles[position] != title)  # type: ignore[misc]
            out.append(rest[:n])
        return out

    def answer_loss(self, questions: Sequence[PreparedQuestion], ids: Tensor) -> Tensor:
        """Eq. 5 under what is mounted: the mean over all answer tokens of `questions`, whose padded ids are (Q, T)."""
        return self.answer_steps(questions, ids).nats()

    def answer_steps(
        self, questions: Sequence[PreparedQuestion], ids: Tensor, final: Tensor | None = None
    ) -> AnswerSteps:
        """What Eq. 5 is made of, from the last block's states `final` (Q, T, D), else those under what is mounted."""
        if final is None:
            final = self.llm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        is_target = torch.zeros(ids.shape, dtype=torch.bool)
        for row, question in enumerate(questions):
            is_target[row, question.n_question : len(question.ids)] = True
        is_target = is_target[:, 1:].to(ids.device)  # (Q, T - 1)
        logits = self.llm.model.get_output_embeddings()(final[:, :-1][is_target])
        return AnswerSteps(logits.float(), ids[:, 1:][is_target], is_target.nonzero()[:, 0])

    def further(
        self,
        batch: Batch,
        questions: Sequence[PreparedQuestion],
        ids: Tensor,
        steps: AnswerSteps,
        another: Callable[[], Experts],
        windows: Callable[[], tuple[Sequence[PreparedQuestion], Experts]],
    ) -> dict[str, tuple[float, Tensor]]:
        """The signals that are on, each with its weight.

        Args:
            questions, ids, steps: the batch's, and what `answer_steps` gave with their own passages' experts.
            another: makes the experts of other passages, one for each question.
            windows: gives what is to be completed, and for each window its passage's experts.
        """
        signals, out = self.signals, dict[str, tuple[float, Tensor]]()
        if signals.distil_weight and signals.teacher is not None:
            taught = signals.teacher.taught([(batch.passages[position], question) for position, question in batch.rows])
            next_ids, probabilities = (part.to(ids.device) for part in taught)
            out["distil"] = signals.distil_weight, distillation_loss(steps.logits, next_ids, probabilities)
        if signals.needs_another:
            experts = held(another())
            with mount(self.llm.model, experts, self.network.config.layer):
                other = self.answer_steps(questions, ids)
            if signals.contrast_weight:
                n = len(questions)
                out["contrast"] = signals.contrast_weight, contrast_loss(steps.nats_each(n), other.nats_each(n))
            if signals.nothing_weight:
                with torch.no_grad(), mount(self.llm.model, without_passages(experts), self.network.config.layer):
                    before = self.answer_steps(questions, ids)
                out["nothing"] = signals.nothing_weight, nothing_loss(other.logits, before.logits)
        if signals.completion_weight:
            opened, experts = windows()
            completion = 0 * steps.logits.sum()  # there is nothing to complete, but each process says as much
            if opened:
                rest = pad_ids([window.ids for window in opened]).to(self.llm.device)
                with mount(self.llm.model, held(experts), self.network.config.layer):
                    completion = self.answer_loss(opened, rest)
            out["completion"] = signals.completion_weight, completion
        return out


class TokensRun(Run):
    """Of the `tokens` hypernetwork.

    Args:
        network, llm, data: what is trained, for what, on what.
        n_per_passage: most questions of a passage.
        reranker: weighs the neurons in Eq. 5 as it will when they are served; None draws weights that look alike.
        n_mounted: passages whose experts are mounted together in Eq. 5, the question's and others of the batch.
    """

    network: TokensHypernetwork

    def __init__(
        self,
        network: TokensHypernetwork,
        llm: FrozenLLM,
        data: TrainingData,
        n_per_passage: int,
        reranker: Reranker | None = None,
        n_mounted: int = 2,
    ) -> None:
        self.network, self.llm, self.reranker, self.n_mounted = network, llm, reranker, n_mounted
        self.passages = [network.tokenise(llm, passage) for passage in data.passages]
        self.lengths = [len(one.piece_ids) for one in self.passages]
        self.prepare(data, n_per_passage, lambda row: pointed_question(llm, row, self.passages[row.passage]))

    def losses(self, batch: Batch, draw: random.Random, *, is_answering: bool) -> Losses:
        network, llm = self.network, self.llm
        tokenised = [self.passages[p] for p in batch.passages]
        with torch.autocast(network.const.device.type, llm.dtype, enabled=llm.dtype == torch.bfloat16):
            tokens = network.tokens(tokenised, network.codes(tokenised))
            keys, values = network.keys(llm, tokens), network.values(llm, tokens)
        questions = [self.questions[q] for _, q in batch.rows]
        own = torch.tensor([position for position, _ in batch.rows])
        beside = self.others(batch, self.n_mounted - 1)
        other = torch.tensor([beside[position][0] for position, _ in batch.rows])
        ids = pad_ids([q.ids for q in questions]).to(llm.device)
        answer, signals = None, dict[str, tuple[float, Tensor]]()
        with plain_attention(llm):
            if is_answering:
                up, down = network.neurons(keys, values, tokens.mask)
                mounted = list(torch.tensor([[at, *beside[at]] for at, _ in batch.rows]).unbind(1))
                weights = self._served_weights(batch, mounted, up.shape[2], draw)
                experts = self._experts(
                    torch.cat([up[some] for some in mounted], 2),
                    torch.cat([down[some] for some in mounted], 1),
                    weights,
                )
                with mount(llm.model, experts, network.config.layer), llm.watched(network.config.layer) as seen:
                    steps = self.answer_steps(questions, ids)
                x, answer = seen[0], steps.nats()
                signals = self.further(
                    batch, questions, ids, steps,
                    lambda: self._experts(up[other], down[other], self._of_a_sentence(batch, other, up.shape[2], draw)),
                    lambda: self._windows(batch, up, down, draw),
                )  # fmt: skip
            else:
                with mount(llm.model, self._experts(None, None, None), network.config.layer):
                    x = llm.states(ids, network.config.layer)
        where = self._pointers(questions, batch, keys.shape[1]).to(keys.device)
        at = _answer_states(x, questions)
        scores = network.scores(at, keys[own])
        return Losses(
            answer,
            pointing_loss(scores, tokens.mask[own], where),
            silence_loss(network.scores(at, keys[other]), tokens.mask[other], where),
            float(pointing_accuracy(scores.detach(), where).float().mean()),
            signals,
        )

    def _of_a_sentence(self, batch: Batch, chosen: Tensor, T: int, draw: random.Random) -> Tensor:
        """The relevance (Q, T) of the neurons of passages, all of it on one sentence of each."""
        weights = torch.zeros(len(chosen), T)
        for row, position in enumerate(chosen.tolist()):
            first, last = draw.choice(self.passages[batch.passages[position]].spans)
            weights[row, first:last] = 1.0
        return weights

    def _windows(
        self, batch: Batch, up: Tensor, down: Tensor, draw: random.Random
    ) -> tuple[list[PreparedQuestion], Experts]:
        """For each question a sentence of its passage, and all relevance on that; the static expert, which answers
        briefly, is left out."""
        chosen, windows, weights = list[int](), list[PreparedQuestion](), list[Tensor]()
        for position, _ in batch.rows:
            passage = self.passages[batch.passages[position]]
            if long_enough := [span for span in passage.spans if span[1] - span[0] > N_OPENING]:
                first, last = draw.choice(long_enough)
                chosen.append(position)
                windows.append(window_of(self.llm, passage.ids[first:last], draw))
                weights.append(torch.zeros(up.shape[2]).index_fill(0, torch.arange(first, last), 1.0))
        if not windows:
            return [], self._experts(None, None, None)
        return windows, replace(self._experts(up[chosen], down[chosen], torch.stack(weights)), static=None)

    @torch.no_grad()
    def validated(self, batch: Batch, *, is_own: bool) -> Given:
        """The sentence that holds the answer alone, or a sentence of another passage."""
        tokenised = [self.passages[p] for p in batch.passages]
        up, down = self._neurons(tokenised)
        chosen = [position if is_own else (position + 1) % len(tokenised) for position, _ in batch.rows]
        weights = torch.zeros(len(chosen), up.shape[2])
        for row, (position, (_, question)) in enumerate(zip(chosen, batch.rows, strict=True)):
            spans, sentence = tokenised[position].spans, self.questions[question].sentence
            first, last = spans[sentence if is_own else sentence % len(spans)]
            weights[row, first:last] = 1.0
        return Given(self._experts(up[chosen], down[chosen], weights), ("",) * len(chosen))

    def static_loss(self, batch: Batch) -> Tensor:
        """With the static expert and the query experts."""
        questions = [self.questions[q] for _, q in batch.rows]
        ids = pad_ids([q.ids for q in questions]).to(self.llm.device)
        experts = self._experts(None, None, None)
        with plain_attention(self.llm), mount(self.llm.model, experts, self.network.config.layer):
            return self.answer_loss(questions, ids)

    @torch.no_grad()
    def served(self, rows: Sequence[tuple[int, Sequence[int]]]) -> Experts:
        """The experts of Q questions, each with the passages that are mounted for it, weighed by the reranker at the
        grain at which they are served."""
        assert self.reranker is not None
        is_of_words = RetrievalConfig().grain == "words"
        places = {passage: place for place, passage in enumerate(dict.fromkeys(p for _, some in rows for p in some))}
        tokenised = [self.passages[passage] for passage in places]
        up, down = self._neurons(tokenised)
        T, n = up.shape[2], max(len(some) for _, some in rows)
        weights = torch.zeros(len(rows), n * T)
        for row, (question, some) in enumerate(rows):
            found = self.reranked_weights(self.reranker, question, some, is_of_words=is_of_words)
            for position, (passage, each) in enumerate(zip(some, found, strict=True)):
                first = position * T + self.passages[passage].spans[0][0]
                weights[row, first : first + len(each)] = torch.tensor(each)
        chosen = torch.tensor([[places[p] for p in [*some, *[some[0]] * (n - len(some))]] for _, some in rows])
        return self._experts(
            torch.cat([up[chosen[:, k]] for k in range(n)], 2), torch.cat([down[chosen[:, k]] for k in range(n)], 1),
            weights,
        )  # fmt: skip

    def _neurons(self, tokenised: Sequence[Tokenised]) -> tuple[Tensor, Tensor]:
        """`up` (P, D, T) and `down` (P, T, D) of P passages."""
        network, llm = self.network, self.llm
        with torch.autocast(network.const.device.type, llm.dtype, enabled=llm.dtype == torch.bfloat16):
            tokens = network.tokens(tokenised, network.codes(tokenised))
            return network.neurons(network.keys(llm, tokens), network.values(llm, tokens), tokens.mask)

    def _experts(self, up: Tensor | None, down: Tensor | None, weights: Tensor | None) -> Experts:
        llm, network = self.llm, self.network
        static, query = network.static, network.query
        up, down, weights = (None if t is None else t.to(llm.device, llm.dtype) for t in (up, down, weights))
        return Experts(
            up=up,
            down=down,
            neuron_weights=weights,
            static=None if static is None else static.to(llm.device, llm.dtype),
            query=None if query is None else query.to(llm.device, llm.dtype),
            max_norm=network.config.max_norm,
        )

    def _pointers(self, questions: Sequence[PreparedQuestion], batch: Batch, n_tokens: int) -> Pointers:
        sentences = [
            self.passages[batch.passages[position]].spans[question.sentence]
            for (position, _), question in zip(batch.rows, questions, strict=True)
        ]
        return pointers([q.starts for q in questions], [q.n_steps for q in questions], sentences, n_tokens)

    def _served_weights(self, batch: Batch, mounted: Sequence[Tensor], T: int, draw: random.Random) -> Tensor:
        """Relevance (Q, nT) of each neuron of the n passages at the positions `mounted`, of which the first is the
        question's, as rerankers give it: of a share of the questions all of it is on the right sentence, the others' is
        at the grain of words or of sentences."""
        weights = torch.zeros(len(batch.rows), len(mounted) * T)
        for row, (_, question) in enumerate(batch.rows):
            served = [batch.passages[int(some[row])] for some in mounted]
            if draw.random() < _KNOWN_SHARE:
                first, last = self.passages[served[0]].spans[self.questions[question].sentence]
                weights[row, first:last] = 1.0
                continue
            if self.reranker is None:
                found = self._drawn_weights(question, served, draw)
            else:
                found = self.reranked_weights(self.reranker, question, served, is_of_words=draw.random() < _WORDS_SHARE)
            for place, (passage, some) in enumerate(zip(served, found, strict=True)):
                first = place * T + self.passages[passage].spans[0][0]
                weights[row, first : first + len(some)] = torch.tensor(some)
        return weights

    def _drawn_weights(self, question: int, served: Sequence[int], draw: random.Random) -> list[list[float]]:
        """A softmax of random scores of the passages' sentences that favour the right one."""
        spans = [self.passages[passage].spans for passage in served]
        scores = [draw.gauss(-1.5 if place else 0.0, 1.5) for place, some in enumerate(spans) for _ in some]
        scores[self.questions[question].sentence] = draw.gauss(4.0, 2.0)
        shares = torch.split(torch.tensor(scores).softmax(0), [len(some) for some in spans])
        return [_spread(some, each.tolist()) for some, each in zip(spans, shares, strict=True)]

    def reranked_weights(
        self, reranker: Reranker, question: int, read: Sequence[int], *, is_of_words: bool
    ) -> list[list[float]]:
        """What the reranker makes of passages that it reads without their vectors: for each the weights of its
        sentences' tokens, by Eq. 9 as when experts are served, at the grain of words where it tells them apart."""
        passages = [self.data.passages[passage] for passage in read]
        items = [RerankItem(one.title, one.text, one.spans) for one in passages]
        scores = reranker.score(self.data.questions[question].question, items)
        relevances = relevance([one.score for one in scores])
        out = []
        for passage, score, weight in zip(read, scores, relevances, strict=True):
            tokenised = self.passages[passage]
            sentences = [weight * share for share in relevance(score.segment_scores)]
            if is_of_words and score.word_scores:
                spans = self.data.passages[passage].spans
                words = word_relevance(score.word_scores, spans, sentences)
                out.append(word_weights(tokenised.places, words))
            else:
                out.append(_spread(tokenised.spans, sentences))
        return out


def window_of(llm: FrozenLLM, ids: Sequence[int], draw: random.Random) -> PreparedQuestion:
    """A stretch of text of more than `N_OPENING` tokens to complete: the first of these are given, as a prompt."""
    n = N_OPENING + _N_COMPLETED
    first = draw.randrange(max(1, len(ids) - n + 1))
    start = llm.start_ids
    return PreparedQuestion([*start, *ids[first : first + n]], len(start) + N_OPENING, [], 0)


def _spread(spans: Sequence[tuple[int, int]], weights: Sequence[float]) -> list[float]:
    """The weights of sentences, each for all of its tokens."""
    return [weight for (first, last), weight in zip(spans, weights, strict=True) for _ in range(first, last)]


@contextmanager
def plain_attention(llm: FrozenLLM) -> Iterator[None]:
    """Attention as plain products: on a CPU the fused kernel's backward takes a third of a step at these lengths."""
    before = llm.model.config._attn_implementation
    llm.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        llm.model.set_attn_implementation(before)


def written_question(llm: FrozenLLM, row: QuestionRow, *, is_start: bool = True) -> PreparedQuestion | None:
    """A question with its answer in token ids, wherever that stands; None when the question is too long.

    Args:
        is_start: nothing stands before the question.
    """
    asked = llm.prompt_ids(question_prompt(row.question), is_start=is_start)
    written = llm.prompt_ids(answer_target(row.answers[0]), is_start=False)
    if len(written) < 2 or len(asked) > _MAX_QUESTION_TOKENS:
        return None
    return PreparedQuestion(asked + written, len(asked), [], row.segment)


def pointed_question(llm: FrozenLLM, row: QuestionRow, passage: Tokenised) -> PreparedQuestion | None:
    """The same with the answer's places; None also when its tokens do not stand within a sentence of the passage."""
    found = written_question(llm, row)
    if found is None:
        return None
    body = found.ids[found.n_question : -1]
    starts, sentence = [], None
    for position, (first, last) in enumerate(passage.spans):
        for place in range(first, last - len(body) + 1):
            if passage.ids[place : place + len(body)] == body:
                starts.append(place)
                sentence = position if sentence is None else sentence
    return None if sentence is None else replace(found, starts=starts, sentence=sentence)


def _answer_states(x: Tensor, questions: Sequence[PreparedQuestion]) -> Tensor:
    """Of states x (Q, T, D) those from which a token of the answer is written: (Q, J, D)."""
    index = torch.zeros(len(questions), max(q.n_steps for q in questions), dtype=torch.long)
    for row, question in enumerate(questions):
        index[row, : question.n_steps] = torch.arange(question.n_question - 1, len(question.ids) - 1)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]).to(x.device))
