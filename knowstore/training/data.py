"""Training rows: a question, its answer, and the passage whose expert should carry it."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowstore.errors import TrainingError
from knowstore.experts.hypernetwork import PassageInput
from knowstore.records import Passage

Spans = Callable[[str], list[tuple[int, int]]]


@dataclass(frozen=True)
class QuestionRow:
    """One question; `passage` indexes `TrainingData.passages`, `segment` is the sentence that holds the answer."""

    question: str
    answers: tuple[str, ...]
    passage: int
    segment: int


@dataclass(frozen=True)
class TrainingData:
    """Questions on passages that they share: an expert serves all questions of its passage."""

    passages: tuple[PassageInput, ...]
    questions: tuple[QuestionRow, ...]

    def fingerprint(self) -> str:
        """Changes with anything in them, their order included."""
        told = repr((self.passages, self.questions)).encode(errors="backslashreplace")
        return hashlib.sha256(told).hexdigest()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON Lines file, gzip-compressed or not, blank lines left out.

    Raises:
        TrainingError: no such file, or a line that is no JSON object.
    """
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no object")
                yield row
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise TrainingError(
            f"{path} cannot be read as JSON Lines: {error}",
            kept="nothing was trained",
            fix="give a .jsonl or .jsonl.gz file",
        ) from error


def read_passages(path: Path) -> Iterator[Passage]:
    """The passages of a file of rows {title, text}, of which the title may be missing; other rows are left out.

    Raises:
        TrainingError: as for `read_rows`.
    """
    for row in read_rows(path):
        text, title = row.get("text"), row.get("title") or ""
        if isinstance(text, str) and isinstance(title, str) and text.strip():
            yield Passage(text, title)


def load_questions(paths: Iterable[Path], spans: Spans, *, max_answer_words: int = 12) -> TrainingData:
    """Read QA rows `{question, answers, passage: {title, text}}` whose first answer stands in the passage.

    Args:
        spans: gives the character spans of a text's sentences.
        max_answer_words: rows with a longer first answer are left out.

    Raises:
        TrainingError: an unreadable file, or no row that can be used.
    """
    passages: dict[tuple[str, str], int] = {}
    inputs: list[PassageInput] = []
    questions: list[QuestionRow] = []
    for path in paths:
        for row in read_rows(path):
            question, answers, title, text = _fields(row, path)
            answer = answers[0]
            if len(answer.split()) > max_answer_words or answer not in text:
                continue
            if (title, text) not in passages:
                passages[title, text] = len(inputs)
                inputs.append(PassageInput(title, text, tuple(spans(text))))
            passage = passages[title, text]
            segment = segment_of(inputs[passage], (answer,))
            if segment is not None:
                questions.append(QuestionRow(question, answers, passage, segment))
    if not questions:
        raise TrainingError(
            "no question whose answer stands in its passage", kept="nothing was trained",
            fix="give QA rows with question, answers and passage: {title, text}",
        )  # fmt: skip
    return TrainingData(tuple(inputs), tuple(questions))


def _fields(row: dict[str, Any], path: Path) -> tuple[str, tuple[str, ...], str, str]:
    """Question, answers, title and text of a row."""
    try:
        question, answers, passage = row["question"], row["answers"], row["passage"]
        title, text = passage["title"], passage["text"]
    except (KeyError, TypeError) as error:
        raise _row_error(row, path) from error
    if not isinstance(answers, list) or not answers:
        raise _row_error(row, path)
    if not all(isinstance(value, str) for value in (question, *answers, title, text)):
        raise _row_error(row, path)
    return question, tuple(answers), title, text


def _row_error(row: dict[str, Any], path: Path) -> TrainingError:
    return TrainingError(
        f"{path} holds a row that is no question with its answers and passage: {json.dumps(row)[:200]}",
        kept="nothing was trained",
        fix="give QA rows with question, answers and passage: {title, text}",
    )


def segment_of(passage: PassageInput, answers: Sequence[str]) -> int | None:
    """The first sentence that holds an answer, or None."""
    for position, (first, last) in enumerate(passage.spans):
        sentence = passage.text[first:last]
        if any(answer in sentence for answer in answers):
            return position
    return None
