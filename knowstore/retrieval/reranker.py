"""What every reranker takes and gives, and relevance (Eq. 9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from knowstore.errors import RetrievalError

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RerankItem:
    """A candidate passage.

    Args:
        title, text: the passage.
        spans: the (start, end) characters of its S sentences in `text`.
        vector: its vector (E,), or None where it is not at hand.
        segment_vectors: its sentences' vectors (S, E), or None.
        retrieval_score: inner product with the question's vector (Eq. 7).
    """

    title: str
    text: str
    spans: Sequence[tuple[int, int]]
    vector: Vectors | None = None
    segment_vectors: Vectors | None = None
    retrieval_score: float = 0.0


@dataclass(frozen=True)
class RerankScore:
    """Logits of a passage, of its sentences, and of its words, divided by the temperatures that fit them.

    The exponentials of `segment_scores` sum to that of `score`: a softmax over the sentences of several
    passages gives each passage what a softmax over the passages would. `word_scores` are (first character, last
    character, logit) of word pieces in the text, from a reranker that tells which words answer.
    """

    score: float
    segment_scores: tuple[float, ...]
    word_scores: tuple[tuple[int, int, float], ...] = ()


class Reranker(Protocol):
    """Gives candidates a finer score than retrieval did."""

    @property
    def null_threshold(self) -> float | None:
        """The score under which no passage is relevant enough to be used, where the reranker is calibrated."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes a score."""
        ...

    def score(
        self,
        question: str,
        candidates: Sequence[RerankItem],
        question_vector: Vectors | None = None,
        *,
        n_best: int | None = None,
        margin: float = math.inf,
    ) -> list[RerankScore]:
        """Score N candidates, in the order given.

        Args:
            question_vector: (E,), the retriever's, where used.
            n_best, margin: how many of the best will be used, of those that score at most `margin` less than the best
                one; their scores are as if all were, and so is the order of all, but what makes no difference to these
                two may be left out.
        """
        ...


def relevance(scores: Sequence[float], temperature: float = 1.0) -> list[float]:
    """r = softmax(scores / temperature), Eq. 9: non-negative, sums to 1; empty for no scores.

    Raises:
        RetrievalError: a score that is not finite, or a temperature that is not above 0.
    """
    if not scores:
        return []
    logits = np.asarray(scores, np.float64)
    if not (np.isfinite(logits).all() and temperature > 0):
        raise RetrievalError(
            f"relevance of scores {list(scores)} at temperature {temperature} is undefined",
            kept="nothing was mounted",
            fix="use finite scores and a temperature above 0",
        )
    exponentials = np.exp((logits - logits.max()) / temperature)
    return [float(weight) for weight in exponentials / exponentials.sum()]


def word_relevance(
    word_scores: Sequence[tuple[int, int, float]],
    spans: Sequence[tuple[int, int]],
    weights: Sequence[float],
    temperature: float = 1.0,
) -> tuple[tuple[int, int, float], ...]:
    """Eq. 9 within sentences, at the grain of words: in each sentence a softmax over its words' scores, scaled so that
    the likeliest word has the sentence's whole relevance.

    Args:
        word_scores: (first character, last character, score) of word pieces.
        spans: the (start, end) characters of the sentences.
        weights: relevance of each sentence.

    Returns: (first character, last character, weight) of the word pieces that stand in a sentence.
    """
    weighed: list[tuple[int, int, float]] = []
    for (start, end), weight in zip(spans, weights, strict=True):
        within = [word for word in word_scores if start <= word[0] and word[1] <= end]
        best = max((score for _, _, score in within), default=0.0)
        weighed += [
            (first, last, weight * float(np.exp((score - best) / temperature))) for first, last, score in within
        ]
    return tuple(weighed)


def share_among_segments(score: float, segment_logits: Sequence[float]) -> tuple[float, ...]:
    """Shift the logits of a passage's sentences so that their exponentials sum to that of `score`."""
    if not len(segment_logits):
        return ()
    logits = np.asarray(segment_logits, np.float64)
    total = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    return tuple(float(logit) for logit in logits - total + score)
