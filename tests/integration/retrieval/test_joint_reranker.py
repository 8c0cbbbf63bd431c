"""The joint reranker on a tiny random encoder: its logits, its limits, its files, and whom it reads."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from knowstore.encoders import load_base
from knowstore.errors import ConfigError, RetrievalError
from knowstore.retrieval import (
    JointConfig,
    JointModel,
    JointReranker,
    LateReranker,
    RerankItem,
    RerankScore,
    load_reranker,
)
from knowstore.retrieval.joint import N_READ, PASSAGE_TEMPERATURE, UNREAD
from knowstore.retrieval.reranker import relevance

QUESTION = "when was rome founded ?"
TEXT = "rome was founded in 753 bc . it is a city !"
ITEMS = [
    RerankItem("rome", TEXT, [(0, 28), (29, len(TEXT))]),
    RerankItem("", "lyon lies on the rhône .", [(0, 24)]),
    RerankItem("lyon", "it is a city", []),
]


def new(folder: Path, /, **settings: Any) -> JointReranker:
    """A reranker with a random head."""
    encoder = load_base(folder)
    config = JointConfig(encoder.digest, **settings)
    torch.manual_seed(0)
    model = JointModel(encoder, config.max_tokens)
    return JointReranker(model.eval().requires_grad_(False), config)


@pytest.fixture
def reranker(bert: Path) -> JointReranker:
    return new(bert)


def literal_sentence_logits(reranker: JointReranker, base: Path, item: RerankItem) -> list[float]:
    """log of the sum over a sentence's tokens of exp(w . h + b), token by token."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    head = f"{item.title}. " if item.title else ""
    tokens = tokenizer(QUESTION, head + item.text, return_offsets_mapping=True)
    with torch.inference_mode():
        states = AutoModel.from_pretrained(base)(
            **{name: torch.tensor([tokens[name]]) for name in ("input_ids", "token_type_ids", "attention_mask")}
        ).last_hidden_state[0]
    w, b = reranker.model.head.weight[0], reranker.model.head.bias[0]
    logits = []
    for start, end in item.spans:
        total = 0.0
        for position, (first, last) in enumerate(tokens["offset_mapping"]):
            is_passage = tokens.sequence_ids(0)[position] == 1
            if is_passage and first >= start + len(head) and last <= end + len(head):
                total += math.exp(float(states[position] @ w + b))
        logits.append(math.log(total))
    return logits


def test_sentence_logits_are_those_of_the_equation(reranker: JointReranker, bert: Path) -> None:
    for item, score in zip(ITEMS[:2], reranker.score(QUESTION, ITEMS)[:2], strict=True):
        expected = literal_sentence_logits(reranker, bert, item)
        assert score.segment_scores == pytest.approx(expected, abs=1e-5)
        assert score.score == pytest.approx(math.log(sum(map(math.exp, expected))), abs=1e-5)


def test_passage_without_sentences_scores_as_one_sentence(reranker: JointReranker) -> None:
    whole = replace(ITEMS[2], spans=[(0, len(ITEMS[2].text))])
    bare, spanned = reranker.score(QUESTION, [ITEMS[2], whole])
    assert bare.segment_scores == ()
    assert bare.score == pytest.approx(spanned.score, abs=1e-5)


def test_a_score_does_not_depend_on_what_else_is_scored(reranker: JointReranker) -> None:
    items = [*ITEMS, RerankItem("", "rome " * 40, [(0, 4), (5, 9)]), RerankItem("", "", [])]
    together = reranker.score(QUESTION, items)
    for item, score in zip(items, together, strict=True):
        [alone] = reranker.score(QUESTION, [item])
        assert alone.score == pytest.approx(score.score, abs=1e-4)
        assert alone.segment_scores == pytest.approx(score.segment_scores, abs=1e-4)


def test_sentences_behind_the_token_limit_score_low_and_finite(bert: Path) -> None:
    text = "rome " * 30 + "lyon lies ."
    reranker = new(bert, max_tokens=20)
    title_fills_it = RerankItem("rome " * 30, text, [(0, 4), (150, 161)])
    first, second = reranker.score(QUESTION, [RerankItem("", text, [(0, 149), (150, 161)]), title_fills_it])
    assert first.segment_scores[1] == UNREAD
    assert first.score == pytest.approx(first.segment_scores[0])
    assert second.segment_scores == (UNREAD, UNREAD)
    assert UNREAD <= second.score < UNREAD + 1


def test_odd_questions_and_texts_score_finite(reranker: JointReranker) -> None:
    assert reranker.score(QUESTION, []) == []
    odd = ["", "\ud800", "\x00", "漢字" * 500, "rome " * 900]
    for question in odd:
        scores = reranker.score(question, [RerankItem(text, text, [(0, len(text))]) for text in odd])
        assert all(math.isfinite(score.score) for score in scores)


def test_bfloat16_scores_are_near_those_of_float32(reranker: JointReranker) -> None:
    half = JointReranker(reranker.model, reranker.config, torch.bfloat16).score(QUESTION, ITEMS)
    for one, other in zip(half, reranker.score(QUESTION, ITEMS), strict=True):
        assert one.score == pytest.approx(other.score, abs=0.1)


def test_a_saved_reranker_loads_with_the_same_scores(bert: Path, tmp_path: Path) -> None:
    reranker = new(bert, null_threshold=-1.5, temperature=1.25, trained_steps=7, notes="for tests")
    reranker.save(tmp_path)
    loaded = JointReranker.load(tmp_path, bert)
    assert loaded.config == reranker.config
    assert (loaded.config.null_threshold, loaded.config.temperature) == (-1.5, 1.25)
    for one, other in zip(loaded.score(QUESTION, ITEMS), reranker.score(QUESTION, ITEMS), strict=True):
        assert one.score == pytest.approx(other.score, abs=0.05)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"head.weight", "head.bias", "encoder.layer.0.output.dense.weight"} <= names
    assert not any("embeddings" in name for name in names)
    loaded.save(tmp_path / "again")
    assert JointReranker.load(tmp_path / "again", bert).score(QUESTION, ITEMS) == loaded.score(QUESTION, ITEMS)


def test_more_layers_may_be_trained_than_before_and_not_fewer(bert: Path, tmp_path: Path) -> None:
    model = JointModel(load_base(bert, n_shared=1))
    n_tensors = len(model.weights())
    with pytest.raises(ConfigError, match="2 layers cannot stay as published: only the first 1 of this encoder are"):
        model.share(2)
    assert (model.base.n_shared, len(model.weights())) == (1, n_tensors)
    model.share(0)
    assert len(model.weights()) > n_tensors
    names = {name for name, parameter in model.enc.named_parameters() if parameter.requires_grad}
    assert "encoder.layer.0.output.dense.weight" in names
    assert not any("embeddings" in name for name in names)
    JointReranker(model.eval(), JointConfig(model.base.digest)).save(tmp_path)
    assert JointReranker.load(tmp_path, bert).model.base.n_shared == 0


def test_another_encoder_is_one_clear_error(bert: Path, bge: Path, tmp_path: Path) -> None:
    new(bert).save(tmp_path)
    with pytest.raises(RetrievalError, match=r"goes with embeddings [0-9a-f]{16}, the encoder in .* has [0-9a-f]{16}"):
        JointReranker.load(tmp_path, bge)
    with pytest.raises(ConfigError, match="cannot be read as an encoder"):
        JointReranker.load(tmp_path, tmp_path / "nothing")


def change_config(folder: Path, **changes: object) -> None:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | changes))


def change_weights(folder: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(folder / "model.safetensors") | {name: tensor}, folder / "model.safetensors")


DAMAGES = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "another kind": lambda folder: change_config(folder, kind="tokens"),
    "an unknown setting": lambda folder: change_config(folder, speed=3),
    "a temperature of 0": lambda folder: change_config(folder, temperature=0),
    "words at a temperature of 0": lambda folder: change_config(folder, word_temperature=0),
    "a threshold that is no number": lambda folder: change_config(folder, null_threshold="low"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut weights": lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"),
    "weights that are NaN": lambda folder: change_weights(folder, "head.bias", torch.tensor([torch.nan])),
    "a head of another width": lambda folder: change_weights(folder, "head.weight", torch.zeros(1, 3)),
    "a layer too many": lambda folder: change_weights(folder, "encoder.layer.9.bias", torch.zeros(1)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_an_error_that_names_the_folder(damage: str, bert: Path, tmp_path: Path) -> None:
    new(bert).save(tmp_path)
    DAMAGES[damage](tmp_path)
    with pytest.raises(RetrievalError, match=f"{tmp_path} holds no joint reranker that can be read") as caught:
        JointReranker.load(tmp_path, bert)
    assert "knowstore train reranker" in caught.value.fix


@pytest.mark.timeout(60)
def test_a_pipe_for_a_config_is_refused_and_not_waited_for(bert: Path, tmp_path: Path) -> None:
    new(bert).save(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(RetrievalError, match="is not a regular file"):
        JointReranker.load(tmp_path, bert)
    with pytest.raises(RetrievalError, match="there is no file config"):
        load_reranker("./folder", tmp_path, torch.device("cpu"), torch.float32)


@pytest.fixture
def many() -> tuple[list[RerankItem], np.ndarray]:
    """Twelve candidates with vectors, and the question's."""
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(13, 3, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    items = [
        RerankItem(f"lyon {n}", TEXT, [(0, 28), (29, len(TEXT))], rows[0], rows[1:])
        for n, rows in enumerate(vectors[1:])
    ]
    return items, vectors[0, 0]


def assert_sentences_are_late(found: RerankScore, late: RerankScore) -> None:
    """That a passage was not read: its sentences share its score as the late reranker says."""
    assert relevance(found.segment_scores) == pytest.approx(relevance(late.segment_scores))
    assert math.log(sum(map(math.exp, found.segment_scores))) == pytest.approx(found.score)
    assert not found.word_scores


def test_the_late_reranker_orders_passages_and_the_model_shares_the_scores_of_the_best(
    reranker: JointReranker, many: tuple[list[RerankItem], np.ndarray]
) -> None:
    items, vector = many
    cascade = JointReranker(reranker.model, replace(reranker.config, null_threshold=-1.5), n_read=4)
    scores = cascade.score(QUESTION, items, vector)
    late = LateReranker().score(QUESTION, items, vector)
    assert [one.score for one in scores] == [one.score / PASSAGE_TEMPERATURE for one in late]
    order = sorted(range(12), key=lambda index: -late[index].score)
    read = reranker.score(QUESTION, [items[index] for index in order[:4]])
    for index, model in zip(order[:4], read, strict=True):
        gaps = np.subtract(scores[index].segment_scores, model.segment_scores)
        assert gaps[0] == pytest.approx(gaps[1], abs=1e-4)
        assert math.log(sum(map(math.exp, scores[index].segment_scores))) == pytest.approx(scores[index].score)
        assert [word[:2] for word in scores[index].word_scores] == [word[:2] for word in model.word_scores]
    for index in order[4:]:
        assert_sentences_are_late(scores[index], late[index])
    assert cascade.null_threshold == pytest.approx(-1.8 / PASSAGE_TEMPERATURE)
    assert JointReranker(reranker.model, cascade.config, n_read=None).null_threshold == -1.5


def test_only_the_best_are_read_when_no_others_are_used(
    reranker: JointReranker, many: tuple[list[RerankItem], np.ndarray]
) -> None:
    items, vector = many
    whole, cut = (reranker.score(QUESTION, items, vector, n_best=n_best) for n_best in (None, 2))
    assert [one.score for one in cut] == [one.score for one in whole]
    late = LateReranker().score(QUESTION, items, vector)
    order = sorted(range(12), key=lambda index: -late[index].score)
    for index in order[:2]:
        assert cut[index].segment_scores == pytest.approx(whole[index].segment_scores, abs=1e-5)
        assert len(cut[index].word_scores) == len(whole[index].word_scores) > 0
    for index in order[2:]:
        assert_sentences_are_late(cut[index], late[index])


@pytest.mark.parametrize("n_best", [None, 4])
def test_what_scores_less_than_the_best_by_more_than_the_margin_is_not_read(
    n_best: int | None, reranker: JointReranker, many: tuple[list[RerankItem], np.ndarray]
) -> None:
    items, vector = many
    late = LateReranker().score(QUESTION, items, vector)
    order = sorted(range(12), key=lambda index: -late[index].score)
    gaps = [(late[order[0]].score - late[index].score) / PASSAGE_TEMPERATURE for index in order]
    assert gaps[1] < gaps[2]
    whole, cut = (
        reranker.score(QUESTION, items, vector, n_best=n_best, margin=margin)
        for margin in (math.inf, (gaps[1] + gaps[2]) / 2)
    )
    assert [one.score for one in cut] == [one.score for one in whole]
    assert [bool(cut[index].word_scores) for index in order[:4]] == [True, True, False, False]
    for index in order[:2]:
        assert cut[index].segment_scores == pytest.approx(whole[index].segment_scores, abs=1e-5)
    assert not any(one.word_scores for one in reranker.score(QUESTION, items, vector, n_best=0))


def test_candidates_that_tie_with_the_last_of_the_best_are_read_too(
    reranker: JointReranker, many: tuple[list[RerankItem], np.ndarray]
) -> None:
    items, vector = many
    scores = reranker.score(QUESTION, [items[0]] * 3, vector, n_best=1)
    assert scores[0].word_scores
    assert [one.word_scores for one in scores] == [scores[0].word_scores] * 3


def test_all_are_read_without_vectors_or_without_a_limit(
    reranker: JointReranker, many: tuple[list[RerankItem], np.ndarray]
) -> None:
    items, vector = many
    everything = JointReranker(reranker.model, reranker.config, n_read=None).score(QUESTION, items, vector)
    assert reranker.score(QUESTION, items) == everything
    bare = [replace(item, segment_vectors=None) for item in items]
    assert reranker.score(QUESTION, bare, vector) == everything
    assert reranker.score(QUESTION, items, vector) != everything


def test_the_temperature_is_that_of_what_the_model_itself_makes_of_passages_and_sentences(
    reranker: JointReranker, many: tuple[list[RerankItem], np.ndarray]
) -> None:
    items, vector = many
    config = replace(reranker.config, temperature=2.0, null_threshold=-3.0)
    for question_vector, n_read in ((vector, N_READ), (None, N_READ), (vector, None)):
        scorers = [JointReranker(reranker.model, each, n_read=n_read) for each in (reranker.config, config)]
        plain, tempered = (each.score(QUESTION, items, question_vector) for each in scorers)
        is_late = question_vector is not None and n_read is not None
        for one, other in zip(plain, tempered, strict=True):
            if is_late:
                assert other.score == one.score
            assert math.log(sum(map(math.exp, other.segment_scores))) == pytest.approx(other.score)
            assert relevance(other.segment_scores) == pytest.approx(
                relevance(one.segment_scores, 2.0 if one.word_scores else 1.0)
            )
    assert scorers[1].null_threshold == -3.0


def test_a_folder_of_kind_joint_is_loaded_with_the_encoder_that_it_names(bert: Path, tmp_path: Path) -> None:
    new(bert, base="some/encoder").save(tmp_path)
    asked: list[str] = []

    def base(reference: str) -> Path:
        asked.append(reference)
        return bert

    for reference in ("default", str(tmp_path)):
        assert isinstance(load_reranker(reference, tmp_path, base=base), JointReranker)
    assert asked == ["some/encoder"] * 2
    assert isinstance(load_reranker("late", tmp_path, base=base), LateReranker)
    with pytest.raises(RetrievalError, match="needs the encoder that it was trained on, 'some/encoder'"):
        load_reranker(str(tmp_path), tmp_path)


def test_fingerprint_changes_with_weights_and_settings(reranker: JointReranker) -> None:
    model, config = reranker.model, reranker.config
    others = [
        JointReranker(model, config, weights_fingerprint="other"),
        JointReranker(model, config, n_read=3),
        JointReranker(model, replace(config, temperature=2.0)),
    ]
    assert len({one.fingerprint for one in (reranker, *others)}) == 4
    assert JointReranker(model, config).fingerprint == reranker.fingerprint


def test_an_encoder_without_special_tokens_is_refused(bert: Path) -> None:
    base = load_base(bert)
    base.tokenizer.sep_token = None
    with pytest.raises(ConfigError, match=r"no \[CLS\], \[SEP\] or padding token"):
        JointModel(base)
