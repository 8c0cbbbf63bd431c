"""Questions whose answers stand in their passages, as benches read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def villages(tmp_path: Path) -> Callable[[int], Path]:
    """A function that writes so many questions, each with the passage that answers it, to a file."""

    def write(n: int) -> Path:
        rows = [
            {
                "question": f"How high is the tower of village {number}?",
                "answers": [f"{number} metres"],
                "passage": {"title": "Village", "text": f"The tower of village {number} is {number} metres high."},
            }
            for number in range(n)
        ]
        path = tmp_path / "qa.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions, each on a passage of its own."""
    rows = [
        {
            "question": f"Where does town {number} lie?",
            "answers": [f"place {number}"],
            "passage": {"title": "", "text": f"Town {number} is old. It lies at place {number}."},
        }
        for number in range(6)
    ]
    file = tmp_path_factory.mktemp("towns") / "qa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file
