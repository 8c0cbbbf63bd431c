"""End-to-end answers and locality on tiny models: every row is there, and its shares are those of what was asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from knowstore.bench import can_plot, locality, plot_answers, run_answers, run_locality
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError


def written(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = [f"The tower of town {number} is old. It is {number} metres high." for number in range(12)]
    return written(tmp_path / "corpus.jsonl", [{"title": "", "text": text} for text in texts])


@pytest.fixture
def questions(villages: Callable[[int], Path]) -> Path:
    return villages(3)


def test_answers_are_scored_for_each_number_of_passages(
    tiny_models: ModelConfig, questions: Path, corpus: Path, tmp_path: Path
) -> None:
    found = run_answers(
        questions, [corpus], models=tiny_models, top_ks=(1, 15), modes=("experts", "hybrid"), limit=3, max_tokens=2
    )
    rows = found["rows"]
    assert isinstance(rows, list)
    assert (found["passages"], found["questions"]) == (15, 3)
    assert [(row["method"], row["k"]) for row in rows] == [
        ("base", 0), ("static", 0), ("experts", 1), ("experts", 15), ("hybrid", 1), ("hybrid", 15),
        ("experts, as served", 4), ("hybrid, as served", 4),
    ]  # fmt: skip
    assert [row["given"] for row in rows[:2]] == [0.0, 0.0]
    assert rows[3]["given"] == rows[3]["held"] == 1.0  # all passages were mounted
    assert all(row["n"] == 3 and row["em_ci"][0] <= row["em"] <= row["em_ci"][1] for row in rows)
    if not can_plot():
        pytest.skip("extra `plots` is not installed")
    plot_answers(rows, tmp_path / "answers.png")
    assert (tmp_path / "answers.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_passages_that_hold_an_answer_none_that_does_is_mounted(
    tiny_models: ModelConfig, questions: Path, corpus: Path
) -> None:
    found = run_answers(
        questions, [corpus], models=tiny_models, top_ks=(1, 15), modes=("experts",), limit=3, max_tokens=2,
        is_answer_free=True,
    )  # fmt: skip
    rows = found["rows"]
    assert isinstance(rows, list)
    assert {(row["given"], row["held"]) for row in rows} == {(0.0, 0.0)}


def test_only_what_the_model_alone_answers_is_asked_again(
    tiny_models: ModelConfig, questions: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"alone": "It is 1 metres.", "later": ["2 metres"]}

    def answers(
        reader: object,
        asked: Sequence[str],
        chosen: Sequence[object],
        *,
        batch_size: int,
        is_static: bool | None = None,
    ) -> list[str]:
        return [str(told["alone"])] * len(asked) if is_static is None else ["1 metres" if is_static else "none"]

    monkeypatch.setattr(locality, "answer_all", answers)
    rows = run_locality([questions], [corpus], models=tiny_models, limit=3)["rows"]
    assert isinstance(rows, list)
    assert [(row["control"], row["asked"], row["n"]) for row in rows] == [
        ("static", 3, 1), ("wrong", 3, 1), ("as served", 3, 1),
    ]  # fmt: skip
    assert [(row["kept"], row["same"]) for row in rows] == [(1.0, 0.0), (0.0, 0.0), (0.0, 0.0)]
    assert rows[1]["mounted"] == 1.0


def test_a_model_that_knows_nothing_has_no_locality(tiny_models: ModelConfig, questions: Path, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="answers none of 3 questions"):
        run_locality([questions], [corpus], models=tiny_models, max_tokens=2)


def test_a_counterfactual_passage_comes_with_its_own_answer(tmp_path: Path) -> None:
    from knowstore.bench import run_controls

    rows = [{"question": "Who?", "answers": ["x"], "passage": {"title": "", "text": "It is x."}}]
    with pytest.raises(ConfigError, match="has 0 questions with a passage"):
        run_controls([written(tmp_path / "plain.jsonl", rows)], is_counterfactual=True)
