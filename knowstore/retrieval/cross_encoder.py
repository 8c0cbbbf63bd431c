"""A reranker that reads question and passage together (trained by Eq. 8), in plain transformers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from knowstore.errors import RetrievalError
from knowstore.retrieval.encoding import batches_by_length, quiet_transformers, readable, usable_tokens
from knowstore.retrieval.reranker import RerankItem, RerankScore, Vectors, share_among_segments


class CrossEncoderReranker:
    """Scores (question, title and passage) pairs, and (question, title and sentence) pairs for the sentences.

    Args:
        path: directory of a sequence classifier with one label (MiniLM cross-encoders, BGE rerankers).
        device, dtype: where and in what precision it runs.
        max_tokens: a pair's length; what is longer loses the end of its passage.
        weights_fingerprint: identifies the weights of `path`, for `fingerprint`.

    Raises:
        RetrievalError: no such classifier can be read from `path`.
    """

    null_threshold: float | None = None

    def __init__(
        self,
        path: Path | str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        max_tokens: int = 256,
        weights_fingerprint: str = "",
    ) -> None:
        fix = "give a directory or hub id of a cross-encoder with one label, such as `BAAI/bge-reranker-base`"
        try:
            with quiet_transformers():
                n_labels = AutoConfig.from_pretrained(str(path)).num_labels
                tokenizer: Any = AutoTokenizer.from_pretrained(str(path))
                model = AutoModelForSequenceClassification.from_pretrained(str(path), dtype=dtype)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise RetrievalError(
                f"{path} cannot be read as a cross-encoder: {error}", kept="nothing was reranked", fix=fix
            ) from error
        if n_labels != 1:
            raise RetrievalError(
                f"the classifier in {path} has {n_labels} labels, expected 1", kept="nothing was reranked", fix=fix
            )
        self._model = cast(torch.nn.Module, model.requires_grad_(False).eval().to(device))
        self._tokenizer = tokenizer
        self._device = device
        self._max_tokens = usable_tokens(tokenizer, model.config, max_tokens)
        settings = f"cross-encoder {weights_fingerprint} {self._max_tokens}"
        self.fingerprint = hashlib.sha256(settings.encode()).hexdigest()

    def score(
        self,
        question: str,
        candidates: Sequence[RerankItem],
        question_vector: Vectors | None = None,
        *,
        n_best: int | None = None,
        margin: float = math.inf,
    ) -> list[RerankScore]:
        """Score N candidates, in the order given, whichever are used; `question_vector` makes no difference."""
        return score_texts(question, candidates, self.logits)

    def logits(self, question: str, texts: Sequence[str]) -> list[float]:
        """The classifier's logit of each (question, text) pair, in the order given."""
        if not texts:
            return []
        pairs = self._tokenizer(
            readable([question] * len(texts)),
            readable(texts),
            truncation="longest_first",
            max_length=self._max_tokens,
            split_special_tokens=True,
        )
        logits = [0.0] * len(texts)
        for indices in batches_by_length([len(ids) for ids in pairs["input_ids"]]):
            batch = {name: [rows[i] for i in indices] for name, rows in pairs.items()}
            padded = self._tokenizer.pad(batch, return_tensors="pt").to(self._device)
            with torch.inference_mode():
                scores = self._model(**padded).logits[:, 0].float().cpu()  # (B,)
            for i, score in zip(indices, scores.tolist(), strict=True):
                logits[i] = score
        return logits


class PairScorer(Protocol):
    """Gives the logit of each (question, text) pair."""

    def __call__(self, question: str, texts: Sequence[str], /) -> list[float]: ...


def score_texts(question: str, candidates: Sequence[RerankItem], logits: PairScorer) -> list[RerankScore]:
    """Score passages and their sentences, each with its title, as pairs with the question."""
    texts = []
    for item in candidates:
        head = f"{item.title}\n" if item.title else ""
        texts += [head + item.text, *(head + item.text[start:end] for start, end in item.spans)]
    values = iter(logits(question, texts))
    scores = []
    for item in candidates:
        score = next(values)
        scores.append(RerankScore(score, share_among_segments(score, [next(values) for _ in item.spans])))
    return scores
