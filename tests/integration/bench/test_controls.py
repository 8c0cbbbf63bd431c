"""The controls on tiny models: every row is there, its scores are those of its answers, and it can be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from knowstore.bench import can_plot, plot_controls, plot_training, run_controls
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    names = ("Rome", "Lyon", "Ostia")
    rows = [
        {
            "question": f"Where does {name} lie?",
            "answers": [f"place {number}"],
            "passage": {"title": name, "text": f"{name} is a town. It lies at place {number}."},
        }
        for number, name in enumerate(names)
    ]
    file = tmp_path / "qa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def test_every_method_is_scored_under_its_controls(tiny_models: ModelConfig, questions: Path, tmp_path: Path) -> None:
    found = run_controls([questions], models=tiny_models, limit=3, max_tokens=2)
    rows = found["rows"]
    assert isinstance(rows, list)
    methods = ["tokens", "tokens, sentences", "tokens, passages", "tokens, sentence known"]
    assert [(row["method"], row["control"]) for row in rows] == [
        ("base", "none"), ("rag", "gold"), ("rag", "shuffled"), ("tokens", "static"),
        *((method, control) for method in methods for control in ("shuffled", "gold")),
    ]  # fmt: skip
    assert all(row["n"] == 3 and row["em_ci"][0] <= row["em"] <= row["em_ci"][1] for row in rows)
    if not can_plot():
        pytest.skip("extra `plots` is not installed")
    plot_controls(rows, tmp_path / "controls.png")
    assert (tmp_path / "controls.png").read_bytes().startswith(b"\x89PNG")


def test_one_question_has_no_other_to_be_compared_with(tiny_models: ModelConfig, questions: Path) -> None:
    with pytest.raises(ConfigError, match="has 1 questions with a passage, controls need two"):
        run_controls([questions], models=tiny_models, limit=1)


def test_the_curves_of_a_training_log_can_be_drawn(tmp_path: Path) -> None:
    if not can_plot():
        pytest.skip("extra `plots` is not installed")
    log = tmp_path / "log.jsonl"
    rows = [{"step": n, "seconds": 60.0 * n, "loss": 3.0, "answer": None, "gold": 1.0} for n in range(5)]
    log.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[4]]) + '{"step": 5, "sec', "utf-8")
    plot_training(log, tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text("utf-8")
    assert "<svg" in drawn
    assert drawn.count("<path") > 10
