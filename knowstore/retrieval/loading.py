"""Which reranker a reference means."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from knowstore.errors import RetrievalError
from knowstore.retrieval.cross_encoder import CrossEncoderReranker
from knowstore.retrieval.flag import FlagReranker
from knowstore.retrieval.late import LateReranker
from knowstore.retrieval.reranker import Reranker


def load_reranker(
    reference: str,
    path: Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    weights_fingerprint: str = "",
) -> Reranker:
    """Load a reranker: the late one for `default`, else by what its checkpoint is.

    Args:
        reference: `default`, or what `path` was resolved from.
        path: directory of the checkpoint; not used for `default`.
        device, dtype: where and in what precision it runs.
        weights_fingerprint: identifies the weights of `path`.

    Raises:
        RetrievalError: neither a sequence classifier with one label nor a causal LM that FlagEmbedding reads.
    """
    if reference == "default":
        return LateReranker()
    fix = "use `default`, a cross-encoder, or a causal LM reranker such as `BAAI/bge-reranker-v2-gemma`"
    if path is None:
        raise RetrievalError(f"reranker {reference!r} was not resolved to a directory", "nothing was loaded", fix)
    try:
        architecture = (AutoConfig.from_pretrained(str(path)).architectures or ["no architecture"])[0]
    except (OSError, ValueError, KeyError) as error:
        raise RetrievalError(f"reranker {reference!r} cannot be read: {error}", "nothing was loaded", fix) from error
    if architecture.endswith("ForSequenceClassification"):
        return CrossEncoderReranker(path, device, dtype, weights_fingerprint=weights_fingerprint)
    if architecture.endswith("ForCausalLM"):
        return FlagReranker(path, device, dtype, weights_fingerprint=weights_fingerprint)
    raise RetrievalError(f"reranker {reference!r} is a {architecture}", "nothing was loaded", fix)
