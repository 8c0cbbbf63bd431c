"""A few questions to train on, and the tiny reader as it is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from knowstore.experts import PassageInput, ReaderHypernetwork, load_hypernetwork
from knowstore.training import QuestionRow, TrainingData


@pytest.fixture(scope="module")
def data() -> TrainingData:
    """Four passages of two sentences, of different lengths, with a question or two on each."""
    passages, questions = [], []
    for number, name in enumerate(("Rome", "Lyon", "Ostia by the sea", "Tiber")):
        first, second = f"{name} lies on {name}{' far away' * number}.", f"It was founded in {number}."
        text = f"{first} {second}"
        passages.append(PassageInput(name, text, ((0, len(first)), (len(first) + 1, len(text)))))
        questions.append(QuestionRow(f"When was {name} founded?", (f"in {number}",), number, 1))
        if number % 2:
            questions.append(QuestionRow("Where does it lie?", (f"on {name}",), number, 0))
    return TrainingData(tuple(passages), tuple(questions))


@pytest.fixture
def reader(tiny_reader_dir: Path) -> ReaderHypernetwork:
    loaded = load_hypernetwork(tiny_reader_dir)
    assert isinstance(loaded, ReaderHypernetwork)
    return loaded
