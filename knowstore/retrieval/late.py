"""The reranker that needs no files: vectors that are there already, and the words of the question."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from math import log, log1p

import numpy as np
import numpy.typing as npt

from knowstore.errors import RetrievalError
from knowstore.retrieval.reranker import RerankItem, RerankScore, Vectors, share_among_segments

# Weights fitted by conditional likelihood (gold passage among 20 candidates of hybrid search, answering
# sentence among its passage's) on 900 questions of Natural Questions' training part, all-MiniLM-L6-v2.
_PASSAGE_WEIGHTS = np.array([12.9, 10.2, 1.5, 3.4])  # columns of _passage_features
_PASSAGE_BIAS = -15.9  # 0 is where the best candidate is as likely gold as not
NULL_THRESHOLD = -1.8  # keeps 95 % of the questions whose passage is there, refuses 72 % of the others
_SENTENCE_WEIGHTS = np.array([4.3, 0.3, 2.9, 2.0, 2.2, 1.4])  # columns of _sentence_features

_FUNCTION_WORD_SHARE = 0.1
_ASKS_DATE = re.compile(r"\bwhen\b|\b(what|which) (year|date|day|time|month)|\bhow (old|long)")
_ASKS_NUMBER = re.compile(r"\bhow (many|much|far|tall|big|deep|high|large)|\bwhat (number|percent)")
_ASKS_NAME = re.compile(r"\bwho(m|se)?\b|\bwhere\b|\bwhich\b|\bname of|\bwhat (is the name|country|city|state)")
_YEAR = re.compile(r"\b(1\d{3}|20\d\d)\b")
_MONTH = re.compile(r"\b(January|February|March|April|May|June|July|August|September|October|November|December)\b")
_NUMBER = re.compile(
    r"\d|\b(one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred|thousand|million)\b"
)
_NAME = re.compile(r"\b[^\W\d_a-z][\w'-]+")
_ENDINGS = ("ing", "ies", "ed", "es", "s")


class LateReranker:
    """A linear score of late interaction and shared words; English in what it knows of words.

    A passage's score weighs its inner product with the question, its best sentence's, and the shares of the
    question's words (each as rare as it is among the candidates) in the passage and in its best sentence.
    Which sentence answers is told by its inner product, shared words, its place, and whether it holds
    what the question asks for: a date, a number, a name. A score of 0
    means as likely relevant as not.
    """

    fingerprint = "late-1"
    null_threshold: float | None = NULL_THRESHOLD

    def score(
        self,
        question: str,
        candidates: Sequence[RerankItem],
        question_vector: Vectors | None = None,
        *,
        n_best: int | None = None,
        margin: float = math.inf,
    ) -> list[RerankScore]:
        """Score N candidates, in the order given, whichever are used.

        Raises:
            RetrievalError: no question vector, or one of another width than the candidates' vectors.
        """
        if question_vector is None:
            raise RetrievalError(
                "the late reranker was given no question vector",
                kept="nothing was reranked",
                fix="hand it the vector that the retriever made of the question",
            )
        asked = _words(question)
        found = [(_words(item.title), _words(item.text)) for item in candidates]
        rarity = _rarity(asked, [title | text for title, text in found])
        scores = []
        for item, (title, text) in zip(candidates, found, strict=True):
            inner, inner_segments = _inner_products(question_vector, item)
            sentences = [item.text[start:end] for start, end in item.spans]
            words = [_words(sentence) for sentence in sentences]
            shares = [_share(rarity, title | some) for some in words]
            passage = np.array(
                [
                    inner,
                    max(inner_segments, default=inner),
                    _share(rarity, title | text),
                    max(shares, default=_share(rarity, title | text)),
                ]
            )
            features = _sentence_features(
                question, asked, sentences, inner_segments, [_share(rarity, w) for w in words]
            )
            score = float(passage @ _PASSAGE_WEIGHTS) + _PASSAGE_BIAS
            scores.append(RerankScore(score, share_among_segments(score, list(features @ _SENTENCE_WEIGHTS))))
        return scores


def _inner_products(question_vector: Vectors, item: RerankItem) -> tuple[float, list[float]]:
    """Inner products with the passage and with each of its sentences; without vectors, the retrieval score."""
    vectors = [v for v in (item.vector, item.segment_vectors) if v is not None and v.size]
    if any(v.shape[-1] != question_vector.shape[-1] for v in vectors):
        raise RetrievalError(
            f"the question's vector has width {question_vector.shape[-1]}, a candidate's {vectors[0].shape[-1]}",
            kept="nothing was reranked",
            fix="open the store with the retriever that ingested it",
        )
    inner = item.retrieval_score if item.vector is None else float(item.vector @ question_vector)
    if item.segment_vectors is None or len(item.segment_vectors) != len(item.spans):
        return inner, [inner] * len(item.spans)
    return inner, [float(value) for value in item.segment_vectors @ question_vector]


def _words(text: str) -> frozenset[str]:
    """Lower-cased words without accents and common English endings."""
    plain = unicodedata.normalize("NFKD", text.lower())
    words = re.findall(r"\w+", "".join(c for c in plain if not unicodedata.combining(c)))
    return frozenset(_stem(word) for word in words)


def _stem(word: str) -> str:
    ending = next((e for e in _ENDINGS if word.endswith(e) and len(word) - len(e) >= 3), "") if len(word) > 4 else ""
    return word.removesuffix(ending)


_FUNCTION_STEMS = _words(
    """a about after all also an and any are as at be been before but by can could did do does for from had has have
    he her his how i if in into is it its me more most of on or our she so some than that the their them there these
    they this to was we were what when where which while who whom whose why will with would you your"""
)


def _rarity(asked: frozenset[str], texts: Sequence[frozenset[str]]) -> dict[str, float]:
    """Weight of each word of the question: its inverse document frequency among the candidates."""
    rarity = {}
    for word in sorted(asked):
        n_with = sum(word in text for text in texts)
        share = _FUNCTION_WORD_SHARE if word in _FUNCTION_STEMS else 1.0
        rarity[word] = share * log(2 + (len(texts) - n_with + 0.5) / (n_with + 0.5))
    return rarity


def _share(rarity: Mapping[str, float], words: frozenset[str]) -> float:
    return sum(weight for word, weight in rarity.items() if word in words) / (sum(rarity.values()) or 1.0)


def _sentence_features(
    question: str,
    asked: frozenset[str],
    sentences: Sequence[str],
    inner_products: Sequence[float],
    shares: Sequence[float],
) -> npt.NDArray[np.float64]:
    """(S, 6): inner product, shared words, date, number, new names (each if asked for), place."""
    lowered = question.lower()
    asks_date = bool(_ASKS_DATE.search(lowered))
    asks_number = not asks_date and bool(_ASKS_NUMBER.search(lowered))
    asks_name = not asks_date and not asks_number and bool(_ASKS_NAME.search(lowered))
    rows = np.zeros((len(sentences), 6))
    for place, (sentence, inner, share) in enumerate(zip(sentences, inner_products, shares, strict=True)):
        date = (bool(_YEAR.search(sentence)) + bool(_MONTH.search(sentence))) / 2
        number = bool(_NUMBER.search(_YEAR.sub("", sentence)))
        names = sum(not _words(name) <= asked | _FUNCTION_STEMS for name in _NAME.findall(sentence)) if asks_name else 0
        rows[place] = [
            inner,
            share,
            asks_date * date,
            asks_number * number,
            min(1.0, log1p(names) / 2),
            1 / (1 + place),
        ]
    return rows
