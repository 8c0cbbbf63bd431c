"""Training rows: a question, its answer, and the passage whose expert should carry it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowstore.errors import TrainingError
from knowstore.experts.hypernetwork import PassageInput

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


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON Lines file, gzip-compressed or not.

    Raises:
        TrainingError: no such file, or a line that is no JSON object.
    """
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    try:
        with opened as lines:
            for line in lines:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read as JSON Lines: {error}", kept="nothing was trained", fix="give a .jsonl or .jsonl.gz file"
        ) from error


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
            answer, title, text = row["answers"][0], row["passage"]["title"], row["passage"]["text"]
            if len(answer.split()) > max_answer_words or answer not in text:
                continue
            if (title, text) not in passages:
                passages[title, text] = len(inputs)
                inputs.append(PassageInput(title, text, tuple(spans(text))))
            passage = passages[title, text]
            segment = segment_of(inputs[passage], (answer,))
            if segment is not None:
                questions.append(QuestionRow(row["question"], tuple(row["answers"]), passage, segment))
    if not questions:
        raise TrainingError(
            "no question whose answer stands in its passage", kept="nothing was trained",
            fix="give QA rows with question, answers and passage: {title, text}",
        )  # fmt: skip
    return TrainingData(tuple(inputs), tuple(questions))


def segment_of(passage: PassageInput, answers: Sequence[str]) -> int | None:
    """The first sentence that holds an answer, or None."""
    for position, (first, last) in enumerate(passage.spans):
        sentence = passage.text[first:last]
        if any(answer in sentence for answer in answers):
            return position
    return None
