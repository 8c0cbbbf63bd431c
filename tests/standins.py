"""Stand-ins for models, for what is about stores and memory alone: no file, no time, the sizes of the default ones.

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


class StandInRetriever:
    """Random vectors of width `dim`."""

    def __init__(self, dim: int = 384) -> None:
        self.dim = dim

    def encode_questions(self, questions: Sequence[str]) -> Floats:
        """(B, E), one row for each question."""
        return np.stack([_random(question).standard_normal(self.dim, np.float32) for question in questions])

    def encode_passages(
        self, passages: Sequence[Passage], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[Floats, Floats]]:
        """For each passage its vector (E,) and its sentences' (S, E)."""
        encoded = []
        for passage, some in zip(passages, spans, strict=True):
            random = _random(passage.text)
            encoded.append(
                (
                    random.standard_normal(self.dim, np.float32),
                    random.standard_normal((len(some), self.dim), np.float32).astype(np.float16).astype(np.float32),
                )
            )
        return encoded


class StandInModels(LoadedModels):
    """Models that are nowhere; `maker` tells the experts of one hypernetwork from those of another."""

    def __init__(self, width: int = 576, dim: int = 384, maker: str = "maker") -> None:
        super().__init__(ModelConfig())
        self.width, self.maker = width, maker
        self.retriever = StandInRetriever(dim)  # type: ignore[assignment]
        self.fingerprints = {"llm": "llm", "retriever": "retriever", "hypernetwork": maker, "experts": f"llm-{maker}"}

    def generate(self, passage_ids: Sequence[str], inputs: Sequence[Any], *, latent: bool) -> list[StoredExpert]:
        """An expert for each passage, with a neuron for each of about 1.3 tokens a word."""
        return [
            self._expert(passage_id, max(1, len(one.text.split()) * 4 // 3))
            for passage_id, one in zip(passage_ids, inputs, strict=True)
        ]

    def _expert(self, passage_id: str, rank: int) -> StoredExpert:
        random = _random(self.maker + passage_id)
        up = random.standard_normal((self.width, rank), np.float32)
        return StoredExpert(passage_id, "neurons", {"up": up, "down": up.T.copy()}, (rank,), rank)


def _random(text: str) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(text.encode()).digest()[:8]))
