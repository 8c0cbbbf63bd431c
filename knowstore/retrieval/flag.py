"""Rerankers of the BGE family through FlagEmbedding, an optional package that takes seconds to import."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from knowstore.errors import RetrievalError
from knowstore.retrieval.cross_encoder import score_texts
from knowstore.retrieval.encoding import quiet_transformers, readable
from knowstore.retrieval.reranker import RerankItem, RerankScore, Vectors

_BATCH_SIZE = 16


class FlagReranker:
    """A causal LM that answers Yes or No (`BAAI/bge-reranker-v2-gemma`), or a BGE sequence classifier.

    Args:
        path: directory of the checkpoint.
        device, dtype: where and in what precision it runs; a classifier knows float32 and float16 alone.
        max_tokens: the length of question and passage together.
        weights_fingerprint: identifies the weights of `path`, for `fingerprint`.

    Raises:
        RetrievalError: FlagEmbedding is not installed, or cannot read the checkpoint.
    """

    null_threshold: float | None = None

    def __init__(
        self,
        path: Path | str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        max_tokens: int = 512,
        weights_fingerprint: str = "",
    ) -> None:
        try:
            flag = importlib.import_module("FlagEmbedding")
        except ImportError as error:
            raise RetrievalError(
                f"reranker {path} needs FlagEmbedding: {error}",
                kept="nothing was reranked",
                fix="pip install 'knowstore[rerank]', or use the reranker `default`",
            ) from error
        options: dict[str, Any] = {"devices": device, "batch_size": _BATCH_SIZE, "max_length": max_tokens}
        try:
            with quiet_transformers():
                architecture = (AutoConfig.from_pretrained(str(path)).architectures or ["no architecture"])[0]
                if architecture.endswith("ForSequenceClassification"):
                    scorer = flag.FlagReranker(str(path), use_fp16=dtype == torch.float16, **options)
                elif architecture.endswith("ForCausalLM"):
                    precision = {"use_fp16": dtype == torch.float16, "use_bf16": dtype == torch.bfloat16}
                    scorer = flag.FlagLLMReranker(str(path), **precision, **options)
                else:
                    raise ValueError(f"its architecture is {architecture}")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise RetrievalError(
                f"{path} cannot be read as a FlagEmbedding reranker: {error}",
                kept="nothing was reranked",
                fix="give a directory or hub id such as `BAAI/bge-reranker-v2-gemma` or `BAAI/bge-reranker-base`",
            ) from error
        _silence(importlib.import_module(type(scorer).__module__))
        self._scorer: Any = scorer
        self.fingerprint = hashlib.sha256(
            f"flag {architecture} {weights_fingerprint} {max_tokens}".encode()
        ).hexdigest()

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
        """The logit of each (question, text) pair, in the order given."""
        if not texts:
            return []
        pairs = list(zip(readable([question] * len(texts)), readable(texts), strict=True))
        with quiet_transformers():
            return [float(score) for score in self._scorer.compute_score(pairs)]


def _silence(module: Any) -> None:
    """Take the progress bars, which FlagEmbedding shows for every call, out of one of its modules."""

    def without_bar(items: Iterable[Any], **_options: object) -> Iterable[Any]:
        return items

    def range_without_bar(*limits: int, **_options: object) -> range:
        return range(*limits)

    module.tqdm, module.trange = without_bar, range_without_bar
