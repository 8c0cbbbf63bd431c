"""Which reranker a reference means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig

from knowstore.encoders import read_description
from knowstore.errors import RetrievalError
from knowstore.retrieval.cross_encoder import CrossEncoderReranker
from knowstore.retrieval.flag import FlagReranker
from knowstore.retrieval.joint import KIND, PASSAGE_TEMPERATURE, JointReranker, read_config
from knowstore.retrieval.late import NULL_THRESHOLD, LateReranker
from knowstore.retrieval.reranker import Reranker


def load_reranker(
    reference: str,
    path: Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    base: Callable[[str], Path] | None = None,
    weights_fingerprint: str = "",
) -> Reranker:
    """Load a reranker: the late one for `late` and for a `default` that has no weights, else by what its checkpoint is.

    Args:
        reference: `default`, `late`, or what `path` was resolved from.
        path: directory of the checkpoint; not used for `late`.
        device, dtype: where and in what precision it runs.
        base: gives the directory of a retriever's reference; a joint reranker asks for the encoder of its embeddings.
        weights_fingerprint: identifies the weights of `path`.

    Raises:
        RetrievalError: neither a joint reranker nor a sequence classifier with one label nor a causal LM that
            FlagEmbedding reads, or a joint reranker and no `base`.
    """
    if reference == "late" or (reference == "default" and (path is None or not (path / "config.json").is_file())):
        return LateReranker()
    fix = (
        "use `default`, `late`, a folder that `knowstore train reranker` wrote, a cross-encoder, or a causal LM "
        "reranker such as `BAAI/bge-reranker-v2-gemma`"
    )
    if path is None:
        raise RetrievalError(f"reranker {reference!r} was not resolved to a directory", "nothing was loaded", fix)
    if not (path / "config.json").is_file():
        why = f"there is no file config.json in {path}"
        raise RetrievalError(f"reranker {reference!r} cannot be read: {why}", "nothing was loaded", fix)
    if _kind(path) == KIND:
        if base is None:
            raise RetrievalError(
                f"reranker {reference!r} needs the encoder that it was trained on, {read_config(path).base!r}",
                kept="nothing was loaded",
                fix="say where that encoder is with `base`",
            )
        encoder = base(read_config(path).base)
        return JointReranker.load(path, encoder, device, dtype, weights_fingerprint=weights_fingerprint)
    try:
        architecture = (AutoConfig.from_pretrained(str(path)).architectures or ["no architecture"])[0]
    except (OSError, ValueError, KeyError) as error:
        raise RetrievalError(f"reranker {reference!r} cannot be read: {error}", "nothing was loaded", fix) from error
    if architecture.endswith("ForSequenceClassification"):
        return CrossEncoderReranker(path, device, dtype, weights_fingerprint=weights_fingerprint)
    if architecture.endswith("ForCausalLM"):
        return FlagReranker(path, device, dtype, weights_fingerprint=weights_fingerprint)
    raise RetrievalError(f"reranker {reference!r} is a {architecture}", "nothing was loaded", fix)


class Calibration(NamedTuple):
    """When a reranker's scores mean that no passage is relevant, and the temperatures of its softmaxes."""

    null_threshold: float | None = None
    passages: float = 1.0
    sentences: float = 1.0
    words: float = 1.0


def calibration(reference: str, path: Path | None = None) -> Calibration:
    """How a reranker is calibrated, without loading it.

    Raises:
        RetrievalError: its config is damaged.
    """
    if reference == "late" or (reference == "default" and (path is None or not (path / "config.json").is_file())):
        return Calibration(NULL_THRESHOLD)
    if path is None or _kind(path) != KIND:
        return Calibration()
    config = read_config(path)  # passages are ordered by the late one
    return Calibration(
        NULL_THRESHOLD / PASSAGE_TEMPERATURE, PASSAGE_TEMPERATURE, config.temperature, config.word_temperature
    )


def _kind(path: Path) -> object:
    """The `kind` that one of our own checkpoints names."""
    try:
        described = read_description(path / "config.json")
    except (OSError, ValueError, RecursionError):
        return None
    return described.get("kind") if isinstance(described, dict) else None
