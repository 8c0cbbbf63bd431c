"""Reading training rows, good and bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from knowstore.errors import TrainingError
from knowstore.records import Passage
from knowstore.training import load_questions, read_passages, read_rows

ROW = {
    "question": "Who founded it?",
    "answers": ["Romulus", "he"],
    "passage": {"title": "Rome", "text": "Rome is old. Romulus founded it."},
}


def spans(text: str) -> list[tuple[int, int]]:
    end = text.index(".") + 1
    return [(0, end), (end + 1, len(text))]


def write(path: Path, *rows: object) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_questions_share_their_passage_and_know_its_sentence(name: str, tmp_path: Path) -> None:
    again = {**ROW, "question": "What is old?", "answers": ["Rome"]}
    data = load_questions([write(tmp_path / name, ROW, again)], spans)
    assert len(data.passages) == 1
    assert data.passages[0].spans == ((0, 12), (13, 32))
    assert [(row.question, row.answers, row.passage, row.segment) for row in data.questions] == [
        ("Who founded it?", ("Romulus", "he"), 0, 1),
        ("What is old?", ("Rome",), 0, 0),
    ]


def test_passages_may_lack_a_title_and_other_rows_are_left_out(tmp_path: Path) -> None:
    rows = [{"title": "Rome", "text": "A."}, {"text": "B."}, {"title": 3, "text": "C."}, {"text": " "}, {"id": 1}]
    assert list(read_passages(write(tmp_path / "corpus.jsonl", *rows))) == [Passage("A.", "Rome"), Passage("B.")]


def test_rows_that_teach_nothing_are_left_out(tmp_path: Path) -> None:
    absent = {**ROW, "answers": ["Remus"]}
    wordy = {**ROW, "answers": ["Romulus founded it."]}
    across = {**ROW, "answers": ["old. Romulus"]}
    data = load_questions([write(tmp_path / "rows.jsonl", absent, wordy, across, ROW)], spans, max_answer_words=2)
    assert [row.answers[0] for row in data.questions] == ["Romulus"]
    with pytest.raises(TrainingError, match="no question whose answer stands in its passage"):
        load_questions([write(tmp_path / "none.jsonl", absent)], spans)


@pytest.mark.parametrize(
    "content",
    [b"{\n", b"\xff\xfe\n", b"3\n", b"[]\n", gzip.compress(json.dumps(ROW).encode())[:-12], b"\x1f\x8b\x08"],
    ids=["cut", "encoding", "number", "list", "cut gzip", "gzip head"],
)
def test_a_file_that_is_no_json_lines_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / ("rows.jsonl.gz" if content[:1] == b"\x1f" else "rows.jsonl")
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"rows\.jsonl\S* cannot be read as JSON Lines"):
        list(read_rows(path))


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('\ufeff{"a": 1}\n\n \n{"a": 2}\n', encoding="utf-8")
    assert list(read_rows(tmp_path / "rows.jsonl")) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_missing_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be read"):
        load_questions([tmp_path / name], spans)


@pytest.mark.parametrize(
    "changes",
    [
        {"question": None},
        {"answers": []},
        {"answers": "Romulus"},
        {"answers": [7]},
        {"passage": "Rome"},
        {"passage": {}},
    ],
)
def test_a_row_of_another_form_is_refused(changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no question with its answers and passage"):
        load_questions([write(tmp_path / "rows.jsonl", {**ROW, **changes})], spans)
