"""Questions and the corpus that their passages are looked for in."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from knowstore.errors import ConfigError
from knowstore.records import Passage
from knowstore.training import read_passages, read_rows


@dataclass(frozen=True)
class Question:
    """A question with its accepted answers."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class GoldQuestion:
    """A question with its accepted answers and the passage that answers it."""

    question: str
    answers: tuple[str, ...]
    passage: Passage


def names_of(files: Sequence[Path]) -> list[str]:
    """What tables and plots call files: their names, with as many of the folders as it takes to tell them apart."""
    parts = [file.absolute().parts for file in files]
    for n in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(some[-n:]) for some in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def read_questions(path: Path) -> list[Question]:
    """The questions of a file of rows {question or prompt, answers}; other rows are left out.

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: no question.
    """
    rows = [(row.get("question", row.get("prompt")), row.get("answers")) for row in read_rows(path)]
    found = [Question(text, tuple(answers)) for text, answers in rows if isinstance(text, str) and _are_texts(answers)]
    if not found:
        raise ConfigError(
            f"{path} has no questions", kept="nothing was measured",
            fix="give rows {question, answers} or {prompt, answers}, a JSON object a line",
        )  # fmt: skip
    return found


def _are_texts(answers: object) -> TypeGuard[list[str]]:
    return isinstance(answers, list) and bool(answers) and all(isinstance(answer, str) for answer in answers)


def load_corpus(data: Path, corpus: Sequence[Path], limit: int, seed: int) -> tuple[list[GoldQuestion], list[Passage]]:
    """Questions of a file, and the passages of all its questions among those of a corpus.

    Args:
        data: questions in the QA row format, `.jsonl` or `.jsonl.gz`.
        corpus: passages `{title, text}` in the same formats.
        limit: how many questions, drawn with `seed`.

    Returns: the questions, and all passages, each text once whatever its blanks and case.

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: no question with a passage, or a corpus without passages.
    """
    asked = [
        GoldQuestion(
            row["question"], tuple(row.get("answers", ())), Passage(row["passage"]["text"], row["passage"]["title"])
        )
        for row in read_rows(data)
        if isinstance(row.get("question"), str) and _is_passage(row.get("passage"))
    ]
    if not asked:
        raise ConfigError(
            f"{data} has no question with a passage", kept="nothing was measured",
            fix="give a file in the QA row format: question, answers, passage: {title, text}",
        )  # fmt: skip
    passages = load_passages(corpus) + [one.passage for one in asked]
    random.Random(seed).shuffle(asked)
    return asked[:limit], list({text_key(passage): passage for passage in passages}.values())


def text_key(passage: Passage) -> str:
    """What two passages share that are equal but for blanks and case."""
    return " ".join(passage.text.lower().split())


def load_passages(corpus: Sequence[Path]) -> list[Passage]:
    """The passages `{title, text}` of files, `.jsonl` or `.jsonl.gz`.

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: a file without passages.
    """
    passages: list[Passage] = []
    for path in corpus:
        found = list(read_passages(path))
        if not found:
            raise ConfigError(
                f"{path} has no passages",
                kept="nothing was measured",
                fix="give rows {title, text}, a JSON object a line",
            )
        passages += found
    return passages


def _is_passage(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("text"), str) and isinstance(row.get("title"), str)
