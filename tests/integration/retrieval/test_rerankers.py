from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from knowstore.errors import RetrievalError
from knowstore.retrieval import CrossEncoderReranker, FlagReranker, LateReranker, RerankItem, load_reranker

needs_flagembedding = pytest.mark.skipif(
    importlib.util.find_spec("FlagEmbedding") is None, reason="extra `rerank` is not installed"
)
TEXT = "rome was founded in 753 bc . it is a city !"
ITEMS = [
    RerankItem("rome", TEXT, [(0, 28), (29, len(TEXT))]),
    RerankItem("", "lyon lies on the rhône .", [(0, 24)]),
    RerankItem("", "it is a city", []),
]
PAIRS = [f"rome\n{TEXT}", "lyon lies on the rhône .", "it is a city"]


@pytest.mark.parametrize("model", ["cross_encoder", "bge_reranker"])
def test_cross_encoder_scores_are_the_classifiers_logits(model: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = [
            classifier(**tokenizer("when was rome founded", text, return_tensors="pt")).logits.item() for text in PAIRS
        ]
    scores = CrossEncoderReranker(folder).score("when was rome founded", ITEMS)
    assert [score.score for score in scores] == pytest.approx(expected, abs=1e-5)


def test_sentence_scores_share_the_passages_score(cross_encoder: Path) -> None:
    scores = CrossEncoderReranker(cross_encoder).score("who", ITEMS)
    assert [len(score.segment_scores) for score in scores] == [2, 1, 0]
    for score in scores[:2]:
        assert math.log(sum(map(math.exp, score.segment_scores))) == pytest.approx(score.score, abs=1e-6)


def test_cross_encoder_scores_nothing_and_overlong_texts(cross_encoder: Path) -> None:
    reranker = CrossEncoderReranker(cross_encoder)
    assert reranker.score("who", []) == []
    [score] = reranker.score("\ud800", [RerankItem("", "rome " * 900, [])])
    assert math.isfinite(score.score)


def test_classifier_with_two_labels_is_an_error(cross_encoder: Path, bert: Path) -> None:
    with pytest.raises(RetrievalError, match="2 labels"):
        CrossEncoderReranker(bert)


@needs_flagembedding
def test_flag_classifier_agrees_with_plain_transformers(bge_reranker: Path) -> None:
    plain = CrossEncoderReranker(bge_reranker).score("when was rome founded", ITEMS)
    flag = FlagReranker(bge_reranker).score("when was rome founded", ITEMS)
    assert [score.score for score in flag] == pytest.approx([score.score for score in plain], abs=1e-4)


@needs_flagembedding
def test_flag_language_model_scores_by_its_yes(gemma_reranker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reranker = load_reranker("BAAI/bge-reranker-v2-gemma", gemma_reranker)
    assert isinstance(reranker, FlagReranker)
    together = reranker.score("when was rome founded", ITEMS)
    alone = [reranker.score("when was rome founded", [item])[0] for item in ITEMS]
    assert [score.score for score in together] == pytest.approx([score.score for score in alone], abs=1e-4)
    assert len({round(score.score, 6) for score in together}) == len(ITEMS)
    assert "it/s" not in capfd.readouterr().err


def test_missing_flagembedding_is_an_error_that_says_what_to_install(
    gemma_reranker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "FlagEmbedding", None)
    with pytest.raises(RetrievalError, match=r"pip install 'knowstore\[rerank\]'"):
        FlagReranker(gemma_reranker)


def test_reference_decides_which_reranker_is_loaded(cross_encoder: Path, bert: Path, tmp_path: Path) -> None:
    assert isinstance(load_reranker("default"), LateReranker)
    assert isinstance(load_reranker("some/cross-encoder", cross_encoder), CrossEncoderReranker)
    with pytest.raises(RetrievalError, match="BertModel"):
        load_reranker("some/encoder", bert)
    with pytest.raises(RetrievalError, match="cannot be read"):
        load_reranker("nothing", tmp_path)
    with pytest.raises(RetrievalError, match="not resolved"):
        load_reranker("nothing")


def test_fingerprint_changes_with_weights(cross_encoder: Path) -> None:
    one, two = (CrossEncoderReranker(cross_encoder, weights_fingerprint=name).fingerprint for name in "ab")
    assert one != two
