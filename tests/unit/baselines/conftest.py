"""Edits for the tiny LLM."""

from __future__ import annotations

import pytest

from knowstore.baselines import Edit, TaughtFact
from knowstore.records import Passage

USUAL = (
    "Rome was founded in 753 BC. It lies on the river Tiber!",
    "Lyon lies on the Rhône and the Saône; who founded it? Romulus did not.",
    "Where does the river Rhône end? In the sea, and Romulus was the first king of Rome.",
)


@pytest.fixture(scope="session")
def edits() -> tuple[Edit, Edit]:
    return (
        Edit(Passage("Rome lies on the sea.", "Rome"), (TaughtFact("Where does Rome lie?", "Rome", "on the sea"),)),
        Edit(Passage("Lyon was founded by Romulus.", "Lyon"), (TaughtFact("Who founded Lyon?", "Lyon", "Romulus"),)),
    )


@pytest.fixture(scope="session")
def usual_texts() -> tuple[str, ...]:
    return USUAL
