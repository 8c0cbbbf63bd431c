"""Stand-ins for models, for measuring stores and memory alone: no file, no time, the sizes of the default ones.

Vectors and experts are random but a function of the text, so that what is made again is what was there before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from knowstore._loaded import LoadedModels
from knowstore.bank import StoredExpert
from knowstore.config import ModelConfig
from knowstore.records import Passage

Floats = npt.NDArray[np.float32]

_WIDTH = 576  # of the default LLM


class StandInRetriever:
    """Random vectors as wide as the default retriever's."""

    dim = 384

    def encode_questions(self, questions: Sequence[str]) -> Floats:
        """(B, E), one row for each question."""
        return np.stack([_vectors(question, self.dim) for question in questions])

    def encode_passages(
        self, passages: Sequence[Passage], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[Floats, Floats]]:
        """For each passage its vector (E,) and its sentences' (S, E)."""
        encoded = []
        for passage, sentences in zip(passages, spans, strict=True):
            made = _vectors(passage.text, 1 + len(sentences), self.dim)  # (1 + S, E)
            encoded.append((made[0], made[1:].astype(np.float16).astype(np.float32)))
        return encoded


class StandInModels(LoadedModels):
    """Models of which nothing is read from disk."""

    def __init__(self) -> None:
        super().__init__(ModelConfig())
        self.retriever = StandInRetriever()  # type: ignore[assignment]
        self.fingerprints = {role: role for role in ("llm", "retriever", "hypernetwork", "experts")}

    def generate(self, passage_ids: Sequence[str], inputs: Sequence[Any], *, latent: bool) -> list[StoredExpert]:
        """An expert for each passage, with a neuron for each of about 1.3 tokens a word."""
        return [
            _expert(passage_id, max(1, len(one.text.split()) * 4 // 3))
            for passage_id, one in zip(passage_ids, inputs, strict=True)
        ]


def _expert(passage_id: str, rank: int) -> StoredExpert:
    up = _vectors(passage_id, _WIDTH, rank)
    return StoredExpert(passage_id, "neurons", {"up": up, "down": up.T.copy()}, (rank,), rank)


def _vectors(text: str, *shape: int) -> Floats:
    seed = list(hashlib.sha256(text.encode()).digest()[:8])
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
