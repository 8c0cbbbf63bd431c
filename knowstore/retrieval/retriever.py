"""Texts to vectors: one encoder forward gives a passage's vector and the vectors of its sentences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

from knowstore.errors import RetrievalError
from knowstore.records import Passage
from knowstore.retrieval.encoding import batches_by_length, quiet_transformers, readable, usable_tokens

Vectors = npt.NDArray[np.float32]
Pooling = Literal["mean", "cls"]

_DPR = ("DPRQuestionEncoder", "DPRContextEncoder")
_KEPT = "nothing was encoded"


@dataclass(frozen=True)
class _Pooling:
    """How a directory in sentence-transformers form turns token states into one vector."""

    mode: Pooling
    is_normalised: bool
    query_prefix: str


class Retriever:
    """An encoder of Eq. 7: the inner product of a question's and a passage's vector is the retrieval score.

    Attributes:
        dim: E, the width of every vector.
        max_tokens: what a text is cut to, special tokens included.
        fingerprint: 64 hex digits that change with anything that changes a vector: the weights (as
            handed to `load`), pooling, normalisation, prefix, length.
    """

    def __init__(
        self,
        tokenizer: Any,
        question_model: torch.nn.Module,
        passage_model: torch.nn.Module,
        pooling: _Pooling,
        *,
        max_tokens: int,
        weights_fingerprint: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._question_model, self._passage_model = question_model, passage_model
        self._pooling = pooling
        self.max_tokens = max_tokens
        projection = getattr(question_model, "encode_proj", None)
        self.dim = int(
            projection.out_features if projection is not None else cast(Any, question_model).config.hidden_size
        )
        settings = json.dumps(
            [weights_fingerprint, pooling.mode, pooling.is_normalised, pooling.query_prefix, max_tokens]
        )
        self.fingerprint = hashlib.sha256(settings.encode()).hexdigest()

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        max_tokens: int = 256,
        ctx_path: Path | str | None = None,
        query_prefix: str | None = None,
        weights_fingerprint: str = "",
    ) -> Retriever:
        """Read an encoder from a directory.

        Pooling and normalisation come from the directory's sentence-transformers files where it has
        them (mean pooling and L2 norm where not); DPR encoders take the first token, not normalised.

        Args:
            path: directory of the encoder, the question encoder of a DPR pair.
            device, dtype: where and in what precision the encoder runs; vectors are float32 always.
            max_tokens: texts are cut to this many tokens, or to what the encoder can take.
            ctx_path: directory of the passage encoder of a DPR pair; the same encoder when None.
            query_prefix: put before every question (BGE's "Represent this sentence ..."); None takes the
                directory's own `query` prompt, if any.
            weights_fingerprint: identifies the weights of `path` and `ctx_path`, for `fingerprint`.

        Raises:
            RetrievalError: not an encoder that can be read, or one that needs a pooling not known here.
        """
        folder = Path(path)
        pooling = _read_pooling(folder, query_prefix)
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(str(folder))
                question_model, is_dpr = _read_model(folder, device, dtype)
                passage_model = question_model if ctx_path is None else _read_model(Path(ctx_path), device, dtype)[0]
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise RetrievalError(
                f"{folder} cannot be read as an encoder: {error}",
                kept=_KEPT,
                fix="give a directory or hub id of a BERT-like encoder: a sentence-transformers, BGE or DPR model",
            ) from error
        if not tokenizer.is_fast or tokenizer.pad_token_id is None:
            raise RetrievalError(
                f"the tokenizer of {folder} gives no character offsets or has no padding token",
                kept=_KEPT,
                fix="use an encoder with a fast tokenizer (a tokenizer.json file) that has a padding token",
            )
        if is_dpr:
            pooling = _Pooling("cls", False, pooling.query_prefix)
        return cls(
            tokenizer,
            question_model,
            passage_model,
            pooling,
            max_tokens=usable_tokens(tokenizer, cast(Any, question_model).config, max_tokens),
            weights_fingerprint=weights_fingerprint,
        )

    def encode_questions(self, questions: Sequence[str]) -> Vectors:
        """Encode B questions; returns (B, E) in the order given."""
        vectors = np.zeros((len(questions), self.dim), np.float32)
        texts = [self._pooling.query_prefix + question for question in questions]
        for indices, pooled, _, _ in self._encode(self._question_model, texts):
            vectors[indices] = pooled.cpu().numpy()
        return vectors

    def encode_passages(
        self, passages: Sequence[Passage], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[Vectors, Vectors]]:
        """Encode passages with their titles, and the sentences of each from the same forward.

        A sentence's vector is the mean of its tokens' states within the whole passage, so it knows
        its surroundings and costs no forward of its own. A sentence behind `max_tokens`, or without
        any token, gets the passage's vector.

        Args:
            passages: N passages.
            spans: for each passage the (start, end) characters of its S sentences in `text`.

        Returns: for each passage, in the order given, its vector (E,) and its sentences' (S, E).
        """
        encoded: list[tuple[Vectors, Vectors]] = [(np.empty(0, np.float32), np.empty((0, 0), np.float32))] * len(
            passages
        )
        heads = [f"{passage.title}\n" if passage.title else "" for passage in passages]
        texts = [head + passage.text for head, passage in zip(heads, passages, strict=True)]
        for indices, pooled, states, tokens in self._encode(self._passage_model, texts):
            n_segments = max(len(spans[i]) for i in indices)
            chosen = np.zeros((len(indices), n_segments, states.shape[1]), np.float32)
            for row, i in enumerate(indices):
                chosen[row, : len(spans[i])] = _tokens_of_spans(tokens[row], spans[i], len(heads[i]), states.shape[1])
            has_tokens = torch.from_numpy(chosen.any(-1)).to(states.device)[..., None]  # (B, S, 1)
            segments = torch.from_numpy(chosen).to(states.device) @ states  # (B, S, E)
            segments = torch.where(has_tokens, self._normalise(segments), pooled[:, None])
            passage_rows, segment_rows = pooled.cpu().numpy(), segments.cpu().numpy()
            for row, i in enumerate(indices):
                encoded[i] = (passage_rows[row].copy(), segment_rows[row, : len(spans[i])].copy())
        return encoded

    def _normalise(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(vectors, dim=-1) if self._pooling.is_normalised else vectors

    def _encode(
        self, model: torch.nn.Module, texts: Sequence[str]
    ) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, list[list[tuple[int, int]]]]]:
        """Yield per batch: indices of its texts, vectors (B, E), token states (B, T, E), offsets of each token.

        Offsets of special tokens are (0, 0).
        """
        if not texts:
            return
        encodings = self._tokenizer(
            readable(texts),
            truncation=True,
            max_length=self.max_tokens,
            return_offsets_mapping=True,
            split_special_tokens=True,
        )
        ids: list[list[int]] = encodings["input_ids"]
        for indices in batches_by_length([len(row) for row in ids]):
            padded = self._tokenizer.pad(
                {"input_ids": [ids[i] for i in indices]}, padding_side="right", return_tensors="pt"
            )
            padded = padded.to(cast(torch.device, model.device))
            with torch.inference_mode():
                output = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], return_dict=True)
                states = output.last_hidden_state
                projection = getattr(model, "encode_proj", None)
                states = (states if projection is None else projection(states)).float()  # (B, T, E)
                mask = padded["attention_mask"][..., None].float()  # (B, T, 1)
                pooled = (states * mask).sum(1) / mask.sum(1) if self._pooling.mode == "mean" else states[:, 0]
                yield indices, self._normalise(pooled), states, [encodings["offset_mapping"][i] for i in indices]


def _tokens_of_spans(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], shift: int, n_tokens: int
) -> Vectors:
    """Mean weights (S, T) of the tokens that overlap each span, after moving spans by `shift` characters."""
    weights = np.zeros((len(spans), n_tokens), np.float32)
    if not spans:
        return weights
    starts, ends = np.array(offsets).T  # (T,)
    limits = np.array(spans) + shift  # (S, 2)
    overlaps = (starts < limits[:, 1:]) & (ends > limits[:, :1]) & (ends > starts)  # (S, T)
    weights[:, : len(offsets)] = overlaps / np.maximum(overlaps.sum(1, keepdims=True), 1)
    return weights


def gives_unit_vectors(folder: Path) -> bool:
    """Whether the encoder in a directory gives vectors of length 1; told without its weights.

    Raises:
        RetrievalError: its description cannot be read, or asks for a pooling that is not known here.
    """
    try:
        is_dpr = _architecture(folder) in _DPR
    except (OSError, ValueError, KeyError) as error:
        raise RetrievalError(
            f"{folder} cannot be read as an encoder: {error}", kept=_KEPT, fix="fetch the model again"
        ) from error
    return not is_dpr and _read_pooling(folder, None).is_normalised


def _architecture(folder: Path) -> str:
    return str((AutoConfig.from_pretrained(str(folder)).architectures or [""])[0])


def _read_model(folder: Path, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, bool]:
    """The encoder in evaluation mode, and whether it is one of a DPR pair."""
    architecture = _architecture(folder)
    is_dpr = architecture in _DPR
    loader = getattr(transformers, architecture) if is_dpr else AutoModel
    model = loader.from_pretrained(str(folder), dtype=dtype)
    model = model.base_model if is_dpr else model
    return cast(torch.nn.Module, model.requires_grad_(False).eval().to(device)), is_dpr


def _read_pooling(folder: Path, query_prefix: str | None) -> _Pooling:
    modules = _read_json(folder / "modules.json", [])
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    pooling = _read_json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    modes = {key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
             for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True}  # fmt: skip
    unknown = sorted((modes - {"mean", "cls"}) | (set(kinds) - {"Transformer", "Pooling", "Normalize"}))
    if unknown or len(modes) != 1:
        raise RetrievalError(
            f"{folder} pools token states by {', '.join(unknown or sorted(modes)) or 'nothing'}, not by mean or cls",
            kept=_KEPT,
            fix="use an encoder with mean or cls pooling and no further layer behind it",
        )
    if query_prefix is None:
        prompts = _read_json(folder / "config_sentence_transformers.json", {}).get("prompts") or {}
        query_prefix = str(prompts.get("query") or "")
    mode: Pooling = "mean" if modes == {"mean"} else "cls"
    return _Pooling(mode, not kinds or "Normalize" in kinds, query_prefix)


def _read_json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise RetrievalError(
            f"{path} is not JSON: {error}", kept=_KEPT, fix="fetch the model again, the file is damaged"
        ) from error
