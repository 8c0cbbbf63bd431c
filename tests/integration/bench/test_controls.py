"""The controls on tiny models: every row is there, its scores are those of its answers, and it can be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from knowstore._loaded import LoadedModels
from knowstore.bench import can_plot, plot_controls, plot_training, run_controls
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError
from knowstore.experts import Prompt, forced_scores
from knowstore.prompts import passages_prompt, question_prompt

NAMES = ("Rome", "Lyon", "Ostia")


def text_of(number: int) -> str:
    return f"{NAMES[number]} is a town. It lies at place {number}."


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [
        {
            "question": f"Where does {name} lie?",
            "answers": [f"place {number}"],
            "passage": {"title": name, "text": text_of(number)},
        }
        for number, name in enumerate(NAMES)
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
    loaded = LoadedModels(tiny_models)
    alone = [Prompt("", question_prompt(f"Where does {name} lie?")) for name in NAMES]
    read = [Prompt(passages_prompt([(name, text_of(n))]), alone[n].question) for n, name in enumerate(NAMES)]
    for row, prompts in ((rows[0], alone), (rows[1], read)):
        forced = forced_scores(loaded.llm, prompts, [f" place {number}\n" for number in range(3)], None, 0)
        assert row["forced"] == pytest.approx(sum(forced) / 3)
    assert len({row["forced"] for row in rows}) > 1
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
