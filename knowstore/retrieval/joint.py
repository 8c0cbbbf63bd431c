"""The reranker that reads a question and a passage together, once, and scores the passage's sentences (Eq. 8)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from knowstore.encoders import BaseEncoder, int8_tensors, load_base, read_description, read_tensors
from knowstore.errors import ConfigError, KnowledgeStoreError, RetrievalError
from knowstore.retrieval.encoding import batches_by_length, readable, usable_tokens
from knowstore.retrieval.late import NULL_THRESHOLD, LateReranker
from knowstore.retrieval.reranker import RerankItem, RerankScore, Vectors, share_among_segments

KIND = "joint"
N_READ = 8
"""How many candidates of a question are read: the best by the late reranker, twice as many as `top_k` by default."""
UNREAD = -1e4
"""The logit of a sentence of which no token was read."""
PASSAGE_TEMPERATURE = 0.5
"""What the late reranker's scores are divided by in Eq. 9; chosen for the answers with 4 and 8 passages mounted, on
questions and passages of training data."""

_QUESTION_TOKENS = 48
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"

Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class JointConfig:
    """What a folder's config.json says beside its `kind`.

    `base` is the reference of the published encoder whose embeddings and first `n_shared` layers the weights go with,
    `base_digest` what identifies those. Question and passage are cut to `max_tokens` together. The model's logits of
    sentences are divided by `temperature`, those of words by `word_temperature`. A passage that scores less than
    `null_threshold` is not relevant enough, where passages are ordered by the model's own scores; it is None for a
    model that was trained without passages that do not answer.
    """

    base_digest: str
    base: str = "default"
    n_shared: int = 0
    max_tokens: int = 224
    null_threshold: float | None = None
    temperature: float = 1.0
    word_temperature: float = 1.0
    trained_steps: int = 0
    notes: str = ""

    def __post_init__(self) -> None:
        temperatures = (self.temperature, self.word_temperature)
        numbers = (*temperatures, self.null_threshold or 0.0, self.max_tokens, self.n_shared)
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers) or not (
            min(temperatures) > 0 and self.max_tokens >= 8
        ):
            raise RetrievalError(
                f"a joint reranker has temperatures {temperatures!r}, null_threshold {self.null_threshold!r} and "
                f"max_tokens {self.max_tokens!r}",
                kept="nothing was loaded",
                fix="use finite numbers, a temperature above 0 and at least 8 tokens",
            )


@dataclass(frozen=True)
class PassageTokens:
    """Token ids of `title. text`, for each the sentence it stands in, or -1, and its characters in `text` (negative
    ones in the title)."""

    ids: tuple[int, ...]
    sentences: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class PairBatch:
    """`[CLS] question [SEP] title. text [SEP]` of B pairs, each tensor (B, T).

    `types` is 1 from the title on, `mask` 0 at padding, `sentences` -1 at what is in no sentence. `firsts` has for
    each pair the position of its passage's first token.
    """

    ids: Tensor
    types: Tensor
    mask: Tensor
    sentences: Tensor
    firsts: tuple[int, ...]


class JointModel(nn.Module):
    """An encoder and a linear head: a logit for every token of a passage, from which its sentences' follow.

    Attributes:
        max_tokens: the length of a pair, special tokens included.
    """

    def __init__(self, base: BaseEncoder, max_tokens: int = 224) -> None:
        super().__init__()
        self.base = base
        self.enc = base.model
        self.head = nn.Linear(base.width, 1)
        tokenizer = base.tokenizer
        self.max_tokens = usable_tokens(tokenizer, base.model.config, max_tokens)
        if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
            raise ConfigError(
                "the encoder's tokenizer has no [CLS], [SEP] or padding token",
                kept="nothing was loaded", fix="use a BERT-like encoder, such as all-MiniLM-L6-v2",
            )  # fmt: skip

    def read_questions(self, questions: Sequence[str]) -> list[list[int]]:
        """Token ids of questions, each cut so that a passage has room beside it."""
        if not questions:
            return []
        limit = min(_QUESTION_TOKENS, (self.max_tokens - 3) // 2)
        encodings = self.base.tokenizer(
            readable(questions),
            add_special_tokens=False,
            truncation=True,
            max_length=self.max_tokens,  # as for passages: the tokenizer keeps it, and threads share that
            split_special_tokens=True,
        )
        return [ids[:limit] for ids in encodings["input_ids"]]

    def read_passages(self, passages: Sequence[tuple[str, str, Spans]]) -> list[PassageTokens]:
        """Tokens of passages given as (title, text, character spans of the sentences in text)."""
        if not passages:
            return []
        heads = [f"{title}. " if title else "" for title, _, _ in passages]
        texts = [head + text for head, (_, text, _) in zip(heads, passages, strict=True)]
        encodings = self.base.tokenizer(
            readable(texts),
            add_special_tokens=False,
            truncation=True,
            max_length=self.max_tokens,
            return_offsets_mapping=True,
            split_special_tokens=True,
        )
        rows = zip(encodings["input_ids"], encodings["offset_mapping"], heads, passages, strict=True)
        return [
            PassageTokens(
                tuple(ids),
                _sentences_of(offsets, spans, len(head)),
                tuple((start - len(head), end - len(head)) for start, end in offsets),
            )
            for ids, offsets, head, (_, _, spans) in rows
        ]

    def n_tokens(self, question: Sequence[int], passage: PassageTokens) -> int:
        """Length of a pair."""
        return min(self.max_tokens, len(question) + len(passage.ids) + 3)

    def sentences_read(self, question: Sequence[int], passage: PassageTokens) -> set[int]:
        """The sentences of which a token is left beside this question."""
        return set(passage.sentences[: self.max_tokens - len(question) - 3]) - {-1}

    def batch(self, pairs: Sequence[tuple[Sequence[int], PassageTokens]]) -> PairBatch:
        """B pairs of `read_questions` and `read_passages`; what is too long loses the end of its passage."""
        tokenizer = self.base.tokenizer
        first, between = tokenizer.cls_token_id, tokenizer.sep_token_id
        ids, types, sentences, firsts = [], [], [], []
        for question, passage in pairs:
            room = self.max_tokens - len(question) - 3
            n_before, read = len(question) + 2, passage.ids[:room]
            firsts.append(n_before)
            ids.append([first, *question, between, *read, between])
            types.append([0] * n_before + [1] * (len(read) + 1))
            sentences.append([-1] * n_before + [*passage.sentences[:room], -1])
        mask = [[1] * len(row) for row in ids]
        device = self.head.weight.device
        return PairBatch(
            _padded(ids, tokenizer.pad_token_id, device),
            _padded(types, 0, device),
            _padded(mask, 0, device),
            _padded(sentences, -1, device),
            tuple(firsts),
        )

    def token_logits(self, batch: PairBatch, dtype: torch.dtype = torch.float32) -> Tensor:
        """How likely each token is part of the answer: float32 (B, T), of which those in sentences mean something.

        Args:
            batch: B pairs.
            dtype: what the encoder computes in; the head computes in float32.
        """
        with torch.autocast(batch.ids.device.type, dtype, enabled=dtype != torch.float32):
            states = self.base.states(batch.ids, batch.mask, batch.types)  # (B, T, E)
        logits: Tensor = self.head(states.float())[..., 0]
        return logits

    def sentence_logits(self, batch: PairBatch, logits: Tensor) -> Tensor:
        """(B, S) from the tokens' (B, T): the logsumexp of each sentence's, and of a passage's sentences its own.

        Returns: `UNREAD` where a passage has no such sentence or none of its tokens was read.
        """
        n_sentences = max(1, int(batch.sentences.max()) + 1)
        is_in = batch.sentences[..., None] == torch.arange(n_sentences, device=logits.device)  # (B, T, S)
        summed = torch.logsumexp(logits[..., None].masked_fill(~is_in, UNREAD), 1)  # (B, S)
        return summed.masked_fill(~is_in.any(1), UNREAD)

    def forward(self, batch: PairBatch, dtype: torch.dtype = torch.float32) -> Tensor:
        """Sentence logits (B, S) of B pairs."""
        return self.sentence_logits(batch, self.token_logits(batch, dtype))

    def share(self, n_shared: int) -> None:
        """Train more layers: only the first `n_shared` stay as published, which were shared before, too.

        Raises:
            ConfigError: see `BaseEncoder.sharing`; nothing was changed.
        """
        self.base = self.base.sharing(n_shared)

    def weights(self) -> dict[str, Tensor]:
        """The trained tensors: the encoder's layers by their own names, `head.weight`, `head.bias`."""
        head = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        return {name: tensor.detach().cpu() for name, tensor in (self.base.layers() | head).items()}

    def set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Put in what `weights` gave.

        Raises:
            ConfigError: tensors of another encoder; nothing was changed.
        """
        head = {name.removeprefix("head."): t.float() for name, t in tensors.items() if name.startswith("head.")}
        own = self.head.state_dict()
        if set(head) != set(own) or any(own[name].shape != t.shape for name, t in head.items()):
            raise ConfigError(
                f"the head's tensors are {sorted((name, tuple(t.shape)) for name, t in head.items())}, expected "
                f"{sorted((name, tuple(t.shape)) for name, t in own.items())}",
                kept="nothing was loaded", fix="use the encoder that they were trained on",
            )  # fmt: skip
        self.base.set_layers({name: t for name, t in tensors.items() if not name.startswith("head.")})
        self.head.load_state_dict(head)


class JointReranker:
    """Tells with a `JointModel` which sentences and words of a passage answer a question.

    Passages are ordered by the late reranker, which has their vectors at hand and is the better judge of whole
    passages (`knowstore bench rerank`): by its scores over `PASSAGE_TEMPERATURE`. The best `n_read` by it are read, and
    what the model makes of their sentences shares their scores. Without vectors, or without `n_read`, all are read and
    ordered by the model alone.

    Args:
        model: the encoder and its head.
        config: how it was trained and calibrated.
        dtype: what the encoder computes in, on whatever device the model is.
        n_read: how many candidates of a question are read; None reads all.
        weights_fingerprint: identifies the model's weights, for `fingerprint`.
    """

    def __init__(
        self,
        model: JointModel,
        config: JointConfig,
        dtype: torch.dtype = torch.float32,
        *,
        n_read: int | None = N_READ,
        weights_fingerprint: str = "",
    ) -> None:
        self.model, self.config = model, config
        self._dtype, self._n_read = dtype, n_read
        self._late = LateReranker()
        described = asdict(config) | {"notes": ""}
        settings = json.dumps([weights_fingerprint, described, n_read, PASSAGE_TEMPERATURE], sort_keys=True)
        self.fingerprint = hashlib.sha256(f"joint {settings}".encode()).hexdigest()

    @classmethod
    def load(
        cls,
        folder: Path,
        base: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        n_read: int | None = N_READ,
        weights_fingerprint: str = "",
    ) -> JointReranker:
        """Read what `save` wrote.

        Args:
            folder: config.json and model.safetensors, in whatever precision.
            base: directory of the published encoder, for its embeddings and tokenizer.
            device, dtype: where and in what precision the encoder runs.
            n_read, weights_fingerprint: as for the class.

        Raises:
            RetrievalError: files missing or damaged, or another encoder than the one it was trained on.
            ConfigError: no encoder can be read from `base`.
        """
        model, config = load_joint(folder, base)
        model = model.eval().requires_grad_(False).to(torch.device(device))
        return cls(model, config, dtype, n_read=n_read, weights_fingerprint=weights_fingerprint)

    def save(self, folder: Path) -> None:
        """Write model.safetensors, whose matrices are stored in eight bits, and config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _WEIGHTS).write_bytes(save(int8_tensors(self.model.weights())))
        described = {"kind": KIND, **asdict(self.config)}
        (folder / _CONFIG).write_text(json.dumps(described, indent=2) + "\n", "utf-8")

    @property
    def null_threshold(self) -> float | None:
        """Of the scores that order passages: the late reranker's, or the model's own without `n_read`."""
        return self.config.null_threshold if self._n_read is None else NULL_THRESHOLD / PASSAGE_TEMPERATURE

    def score(
        self,
        question: str,
        candidates: Sequence[RerankItem],
        question_vector: Vectors | None = None,
        *,
        n_best: int | None = None,
        margin: float = math.inf,
    ) -> list[RerankScore]:
        """Score N candidates, in the order given; of those that are ordered by vectors, such as are used are read.

        A sentence that was cut off scores `UNREAD`, and so does a passage of which nothing was left.

        Raises:
            RetrievalError: a question vector of another width than the candidates' vectors.
        """
        has_vectors = question_vector is not None and all(item.segment_vectors is not None for item in candidates)
        if self._n_read is None or not has_vectors:
            return self._read(question, candidates)
        scores = [_sharpened(one) for one in self._late.score(question, candidates, question_vector)]
        chosen = _used(scores, self._n_read, n_best, margin)
        for index, read in zip(chosen, self._read(question, [candidates[index] for index in chosen]), strict=True):
            score = scores[index].score
            scores[index] = RerankScore(score, share_among_segments(score, read.segment_scores), read.word_scores)
        return scores

    def _read(self, question: str, candidates: Sequence[RerankItem]) -> list[RerankScore]:
        model = self.model
        asked = model.read_questions([question])[0]
        whole = [item.spans or [(0, len(item.text))] for item in candidates]
        passages = model.read_passages([(c.title, c.text, spans) for c, spans in zip(candidates, whole, strict=True)])
        scores = [RerankScore(UNREAD, ())] * len(candidates)
        for indices in batches_by_length([model.n_tokens(asked, passage) for passage in passages]):
            with torch.inference_mode():
                batch = model.batch([(asked, passages[i]) for i in indices])
                tokens = model.token_logits(batch, self._dtype)
                rows = model.sentence_logits(batch, tokens).double().cpu()  # (B, S)
            for i, row, each, first in zip(indices, rows, tokens.tolist(), batch.firsts, strict=True):
                logits = [self._tempered(logit) for logit in row.tolist()[: len(whole[i])]]
                logits += [UNREAD] * (len(whole[i]) - len(logits))
                score = torch.logsumexp(torch.tensor(logits, dtype=torch.float64), 0).item()
                words = [
                    (*span, logit / self.config.word_temperature)
                    for span, sentence, logit in zip(
                        passages[i].spans, passages[i].sentences, each[first:-1], strict=False
                    )
                    if sentence >= 0
                ]
                scores[i] = RerankScore(score, tuple(logits) if candidates[i].spans else (), tuple(words))
        return scores

    def _tempered(self, logit: float) -> float:
        return logit if logit <= UNREAD else logit / self.config.temperature


def _sharpened(late: RerankScore) -> RerankScore:
    score = late.score / PASSAGE_TEMPERATURE
    return RerankScore(score, share_among_segments(score, late.segment_scores))


def _used(scores: Sequence[RerankScore], n_read: int, n_best: int | None, margin: float) -> list[int]:
    """The best `n_read`, without those that score less than the `n_best`-th or more than `margin` below the first."""
    order = sorted(range(len(scores)), key=lambda index: (-scores[index].score, index))[:n_read]
    if not order or n_best == 0:
        return []
    last = order[-1] if n_best is None else order[min(n_best, len(order)) - 1]
    least = max(scores[last].score, scores[order[0]].score - margin)
    return [index for index in order if scores[index].score >= least]


def load_joint(folder: Path, base: Path) -> tuple[JointModel, JointConfig]:
    """A joint reranker's model on the CPU, as `train_reranker` goes on with it, and its config.

    Args:
        folder, base: as for `JointReranker.load`.

    Raises:
        RetrievalError: files missing or damaged, or another encoder than the one it was trained on.
        ConfigError: no encoder can be read from `base`.
    """
    config = read_config(folder)
    encoder = load_base(base, n_shared=config.n_shared)
    if encoder.digest != config.base_digest:
        raise RetrievalError(
            f"the reranker in {folder} goes with embeddings {config.base_digest}, the encoder in {base} "
            f"has {encoder.digest}",
            kept="nothing was loaded",
            fix=f"give it the encoder that it was trained on ({config.base!r}), or train another reranker "
            "with `knowstore train reranker`",
        )
    model = JointModel(encoder, config.max_tokens)
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in model.weights().items()}
        model.set_weights(read_tensors(folder / _WEIGHTS, shapes))
    except (ConfigError, OSError, ValueError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    return model, config


def read_config(folder: Path) -> JointConfig:
    """The config of a joint reranker, without its weights.

    Raises:
        RetrievalError: it is missing, damaged, or of another kind.
    """
    try:
        described = read_description(folder / _CONFIG)
        kind = described.pop("kind", None)
        if kind != KIND:
            raise ValueError(f"its kind is {kind!r}, expected {KIND!r}")
        return JointConfig(**described)
    except (RetrievalError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> RetrievalError:
    why = error.what if isinstance(error, KnowledgeStoreError) else error
    return RetrievalError(
        f"{folder} holds no joint reranker that can be read: {why}",
        kept="nothing was loaded",
        fix="give a folder that `knowstore train reranker` wrote",
    )


def _sentences_of(offsets: Sequence[tuple[int, int]], spans: Spans, shift: int) -> tuple[int, ...]:
    """For each token the sentence that it stands in whole, or -1; spans are moved by `shift` characters."""
    if not offsets or not spans:
        return (-1,) * len(offsets)
    tokens = np.array(offsets)[:, None]  # (T, 1, 2)
    limits = np.array(spans)[None] + shift  # (1, S, 2)
    is_in = (tokens[..., 0] >= limits[..., 0]) & (tokens[..., 1] <= limits[..., 1])  # (T, S)
    return tuple(np.where(is_in.any(1), is_in.argmax(1), -1).tolist())


def _padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    n = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (n - len(row))] for row in rows], device=device)
