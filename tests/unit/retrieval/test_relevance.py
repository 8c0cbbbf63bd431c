from __future__ import annotations

import math

import pytest

from knowstore.errors import RetrievalError
from knowstore.retrieval import relevance, word_relevance
from knowstore.retrieval.reranker import share_among_segments


def test_relevance_is_the_softmax_of_equation_9() -> None:
    scores, temperature = [2.0, -1.0, 0.5], 0.7
    total = sum(math.exp(score / temperature) for score in scores)
    assert relevance(scores, temperature) == pytest.approx([math.exp(s / temperature) / total for s in scores])


def test_relevance_of_huge_scores_sums_to_one() -> None:
    assert sum(relevance([1e5, 1e5 - 1, -1e5])) == pytest.approx(1.0)


def test_relevance_of_no_scores_is_empty() -> None:
    assert relevance([]) == []


@pytest.mark.parametrize(("scores", "temperature"), [([float("nan")], 1.0), ([float("inf")], 1.0), ([1.0], 0.0)])
def test_relevance_refuses_what_has_no_softmax(scores: list[float], temperature: float) -> None:
    with pytest.raises(RetrievalError, match="undefined"):
        relevance(scores, temperature)


def test_sentences_share_their_passages_score() -> None:
    shared = share_among_segments(3.0, [1.0, 2.0, 900.0, -900.0])
    assert math.log(sum(math.exp(score) for score in shared)) == pytest.approx(3.0)
    assert shared[1] - shared[0] == pytest.approx(1.0)
    assert share_among_segments(3.0, []) == ()


def test_the_likeliest_word_of_a_sentence_has_its_relevance() -> None:
    words = [(0, 4, 1.0), (5, 9, 3.0), (10, 12, -2.0), (9, 11, 8.0)]  # the last stands in no sentence whole
    weighed = word_relevance(words, [(0, 9), (10, 20)], [0.75, 0.25], 2.0)
    assert weighed == (
        (0, 4, pytest.approx(0.75 * math.exp(-1.0))),
        (5, 9, pytest.approx(0.75)),
        (10, 12, pytest.approx(0.25)),
    )
    assert word_relevance([], [(0, 9)], [1.0]) == ()
