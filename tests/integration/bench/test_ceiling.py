"""Experts that are taught by gradient, on tiny models: they learn what they are taught, from either start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from knowstore.bench import CeilingConfig, can_plot, plot_ceiling, run_ceiling
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError

CONFIG = CeilingConfig(layers=((0,), (1, 2)), limit=2, n_questions=2, rank=8, steps=40, learning_rate=0.1, max_tokens=3)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions on each of three towns, and one that is alone on its passage."""
    rows = [
        {
            "question": f"What is part {part} of town {town}?",
            "answers": [f"place {town}{part}"],
            "passage": {"title": "", "text": f"Town {town} has place {town}1, place {town}2 and place {town}3."},
        }
        for town in range(3)
        for part in (1, 2, 3)
    ]
    rows.append({"question": "Who?", "answers": ["Ada"], "passage": {"title": "", "text": "Ada came."}})
    file = tmp_path_factory.mktemp("ceiling") / "qa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def test_experts_learn_what_they_are_taught(tiny_models: ModelConfig, questions: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = run_ceiling([questions], config=CONFIG, models=tiny_models)
    rows = found["rows"]
    kinds = [(row["start"], row["taught"], row["layers"], row["activation"]) for row in rows]
    assert kinds[:3] == [("generated", taught, rows[0]["layers"], "relu")
                         for taught in (None, "other questions", "all questions")]  # fmt: skip
    assert kinds[3:] == [
        ("nothing", taught, layers, activation)
        for layers in ([0], [1, 2]) for activation in ("relu", "softmax")
        for taught in ("other questions", "all questions")
    ]  # fmt: skip
    assert {row["n"] for row in rows} == {2}
    untaught: dict[str, Any] = run_ceiling([questions], config=replace(CONFIG, steps=1), models=tiny_models)
    for before, after in zip(untaught["rows"][1:], rows[1:], strict=True):
        assert after["nats"] < before["nats"] - 0.1, (after, before)
    assert rows[0]["nats"] is None
    if can_plot():
        plot_ceiling(rows, tmp_path / "ceiling.png")
        assert (tmp_path / "ceiling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_questions": 4}, "no passage with 4 questions"),
        ({"layers": ((0, 0),)}, "layers \\[0, 0\\] of a model"),
        ({"layers": ((0, 99),)}, "layers \\[0, 99\\] of a model"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    changes: dict[str, Any], said: str, tiny_models: ModelConfig, questions: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        run_ceiling([questions], config=replace(CONFIG, **changes), models=tiny_models)
