from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, DPRContextEncoder, DPRQuestionEncoder

from knowstore.errors import RetrievalError
from knowstore.records import Passage
from knowstore.retrieval import Retriever, gives_unit_vectors
from knowstore.retrieval.encoding import batches_by_length

TEXT = "rome was founded in 753 bc . it is a city !"
SPANS = [(0, 28), (29, len(TEXT))]


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def states_of(folder: Path, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Token states (T, E) and character offsets, by transformers alone."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", return_offsets_mapping=True)
    offsets = [tuple(pair) for pair in tokens.pop("offset_mapping")[0].tolist()]
    with torch.inference_mode():
        return AutoModel.from_pretrained(folder)(**tokens).last_hidden_state[0].numpy(), offsets


def test_question_vector_is_the_unit_mean_of_its_token_states(bert: Path) -> None:
    states, _ = states_of(bert, "when was rome founded ?")
    [vector] = Retriever.load(bert).encode_questions(["when was rome founded ?"])
    np.testing.assert_allclose(vector, unit(states.mean(0)), atol=1e-5)


def test_sentence_vector_is_the_mean_of_its_tokens_within_the_passage(bert: Path) -> None:
    states, offsets = states_of(bert, f"lyon\n{TEXT}")
    [(vector, segments)] = Retriever.load(bert).encode_passages([Passage(TEXT, "lyon")], [SPANS])
    np.testing.assert_allclose(vector, unit(states.mean(0)), atol=1e-5)
    for row, (start, end) in zip(segments, SPANS, strict=True):
        inside = [i for i, (a, b) in enumerate(offsets) if b > a and a >= start + 5 and b <= end + 5]
        np.testing.assert_allclose(row, unit(states[inside].mean(0)), atol=1e-5)


def test_vectors_do_not_depend_on_what_else_is_in_the_batch(bert: Path) -> None:
    retriever = Retriever.load(bert)
    passages = [Passage("rome " * n) for n in (1, 40, 7, 200, 3)]
    spans = [[(0, 4)], [(0, 4), (5, 9)], [], [(0, 20)], [(5, 9)]]
    together = retriever.encode_passages(passages, spans)
    for passage, span, (vector, segments) in zip(passages, spans, together, strict=True):
        [(alone, alone_segments)] = retriever.encode_passages([passage], [span])
        np.testing.assert_allclose(vector, alone, atol=1e-5)
        np.testing.assert_allclose(segments, alone_segments, atol=1e-5)
        assert segments.shape == (len(span), retriever.dim)


def test_sentence_behind_the_token_limit_gets_the_passages_vector(bert: Path) -> None:
    text = "rome " * 30 + "lyon lies ."
    [(vector, segments)] = Retriever.load(bert, max_tokens=16).encode_passages([Passage(text)], [[(0, 4), (150, 161)]])
    np.testing.assert_array_equal(segments[1], vector)
    assert not np.allclose(segments[0], vector)


def test_bge_takes_the_first_token_and_its_query_prompt(bge: Path) -> None:
    states, _ = states_of(bge, "who is rome")
    [vector] = Retriever.load(bge).encode_questions(["rome"])
    np.testing.assert_allclose(vector, unit(states[0]), atol=1e-5)
    [bare] = Retriever.load(bge, query_prefix="").encode_questions(["rome"])
    assert not np.allclose(bare, vector)


def test_dpr_pair_encodes_questions_and_passages_with_its_own_encoders(dpr: tuple[Path, Path]) -> None:
    retriever = Retriever.load(dpr[0], ctx_path=dpr[1])
    tokenizer = AutoTokenizer.from_pretrained(dpr[0])
    with torch.inference_mode():
        question = DPRQuestionEncoder.from_pretrained(dpr[0])(**tokenizer("who ?", return_tensors="pt")).pooler_output
        passage = DPRContextEncoder.from_pretrained(dpr[1])(**tokenizer(TEXT, return_tensors="pt")).pooler_output
    assert retriever.dim == 8
    np.testing.assert_allclose(retriever.encode_questions(["who ?"]), question.numpy(), atol=1e-5)
    [(vector, segments)] = retriever.encode_passages([Passage(TEXT)], [SPANS])
    np.testing.assert_allclose(vector, passage[0].numpy(), atol=1e-5)
    assert segments.shape == (2, 8)


def test_whether_vectors_have_length_1_is_told_without_weights(
    bert: Path, bge: Path, dpr: tuple[Path, Path], tmp_path: Path
) -> None:
    for folder in (bert, bge, dpr[0]):
        described = shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("*.safetensors"))
        [vector] = Retriever.load(folder).encode_questions(["rome"])
        assert gives_unit_vectors(described) == (abs(np.linalg.norm(vector) - 1) < 1e-3)
    (described / "config.json").unlink()
    with pytest.raises(RetrievalError, match="cannot be read as an encoder"):
        gives_unit_vectors(described)


def test_bfloat16_gives_float32_vectors_near_those_of_float32(bert: Path) -> None:
    half = Retriever.load(bert, dtype=torch.bfloat16).encode_questions(["rome is a city"])
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, Retriever.load(bert).encode_questions(["rome is a city"]), atol=0.05)


def test_nothing_and_odd_texts_are_encoded(bert: Path) -> None:
    retriever = Retriever.load(bert)
    assert retriever.encode_questions([]).shape == (0, 16)
    assert retriever.encode_passages([], []) == []
    vectors = retriever.encode_questions(["", "\ud800", "\x00", "漢字" * 500])
    assert np.isfinite(vectors).all()


def test_fingerprint_changes_with_weights_and_settings(bert: Path) -> None:
    settings = [{}, {"max_tokens": 32}, {"query_prefix": "who "}, {"weights_fingerprint": "other"}]
    assert len({Retriever.load(bert, **options).fingerprint for options in settings}) == len(settings)
    assert Retriever.load(bert).fingerprint == Retriever.load(bert).fingerprint


def test_batches_cover_every_text_once_within_the_budget() -> None:
    lengths = [5, 300, 20, 20, 7, 299, 1000]
    batches = list(batches_by_length(lengths, budget=600))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 600 for batch in batches)


def test_directory_without_an_encoder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="cannot be read as an encoder"):
        Retriever.load(tmp_path)


def test_unknown_pooling_is_an_error_that_names_it(bge: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bge, tmp_path / "model")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    with pytest.raises(RetrievalError, match="lasttoken"):
        Retriever.load(folder)
    (folder / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(RetrievalError, match="is not JSON"):
        Retriever.load(folder)
