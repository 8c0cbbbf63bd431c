from __future__ import annotations

import math

import numpy as np
import pytest

from knowstore.errors import RetrievalError
from knowstore.retrieval import LateReranker, RerankItem

QUESTION = np.array([1.0, 0.0], np.float32)


def item(text: str, *, title: str = "", inner: float = 0.3) -> RerankItem:
    ends = [i + 1 for i, character in enumerate(text) if character == "."]
    spans = list(zip([0, *ends], ends, strict=False))
    spans = [(start + len(text[start:end]) - len(text[start:end].lstrip()), end) for start, end in spans]
    vector = np.array([inner, math.sqrt(1 - inner**2)], np.float32)
    return RerankItem(title, text, spans, vector, np.tile(vector, (len(spans), 1)), inner)


def test_passage_nearer_to_the_question_scores_higher() -> None:
    near, far = LateReranker().score("?", [item("One.", inner=0.8), item("One.", inner=0.2)], QUESTION)
    assert near.score > far.score


def test_passage_with_the_questions_words_scores_higher() -> None:
    candidates = [item("Lyon lies on the Rhône."), item("Rome was founded in 753 BC.")]
    other, right = LateReranker().score("when was rome founded", candidates, QUESTION)
    assert right.score > other.score


def test_title_counts_as_words_of_the_passage() -> None:
    candidates = [item("It is a city.", title="Lyon"), item("It is a city.", title="Rome")]
    other, right = LateReranker().score("what is rome", candidates, QUESTION)
    assert right.score > other.score


@pytest.mark.parametrize(
    ("question", "best"),
    [("when did it happen", 1), ("how many came", 2), ("who led them", 3)],
)
def test_sentence_that_holds_what_is_asked_for_scores_highest(question: str, best: int) -> None:
    text = "it was a fine event. it took place in May 1901. about 300 arrived. then Marie Curie spoke."
    [scored] = LateReranker().score(question, [item(text)], QUESTION)
    assert int(np.argmax(scored.segment_scores)) == best


def test_sentence_scores_share_the_passages_score() -> None:
    [scored] = LateReranker().score("who", [item("Ada spoke. Bob left.")], QUESTION)
    assert math.log(sum(map(math.exp, scored.segment_scores))) == pytest.approx(scored.score)


def test_candidate_without_vectors_uses_its_retrieval_score() -> None:
    bare = RerankItem("", "Rome fell.", [(0, 10)], retrieval_score=0.5)
    full = item("Rome fell.", inner=0.5)
    left, right = LateReranker().score("rome", [bare, full], QUESTION)
    assert left.score == pytest.approx(right.score, abs=1e-5)


def test_odd_texts_are_scored_without_error() -> None:
    odd = [item(""), item("\ud800."), item("漢字。"), RerankItem("", "no spans", [])]
    scores = LateReranker().score("\ud800 ? * \x00", odd, QUESTION)
    assert all(math.isfinite(s.score) for s in scores)
    assert LateReranker().score("who", [], QUESTION) == []


def test_missing_question_vector_is_an_error() -> None:
    with pytest.raises(RetrievalError, match="no question vector"):
        LateReranker().score("who", [item("Ada.")])


def test_vectors_of_another_retriever_are_an_error() -> None:
    with pytest.raises(RetrievalError, match=r"width 3, .* 2"):
        LateReranker().score("who", [item("Ada.")], np.zeros(3, np.float32))
