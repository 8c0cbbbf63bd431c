"""The rerank bench on tiny models: ranks are those of the searches, gold passages are found whatever their blanks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from knowstore.bench import can_plot, plot_rerank, run_rerank
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError


def test_the_gold_passage_is_looked_for_among_all(tiny_models: ModelConfig, tmp_path: Path) -> None:
    texts = [f"The tower of town {number} is {number} metres high." for number in range(12)]
    corpus = tmp_path / "corpus.jsonl.gz"
    with gzip.open(corpus, "wt") as file:
        file.writelines(json.dumps({"title": "", "text": text}) + "\n" for text in texts)
    questions = tmp_path / "qa.jsonl"
    rows = [
        {"question": text, "answers": ["x"], "passage": {"title": "", "text": text.upper().replace(" ", "  ")}}
        for text in texts[:4]
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found = run_rerank(questions, [corpus], models=tiny_models, limit=3, n_candidates=12)
    assert (found["passages"], found["questions"]) == (12, 3)
    measured = found["rows"]
    assert isinstance(measured, list)
    assert [row["method"] for row in measured] == ["vector", "hybrid", "vector, reranked", "hybrid, reranked"]
    for row in measured:
        assert row["found"] == 1.0
        assert row["top1_ci"][0] <= row["top1"] <= row["top4"] <= 1.0
    if not can_plot():
        pytest.skip("extra `plots` is not installed")
    plot_rerank(measured, tmp_path / "rerank.png")
    assert (tmp_path / "rerank.png").read_bytes().startswith(b"\x89PNG")


def test_questions_without_passages_are_refused(tiny_models: ModelConfig, tmp_path: Path) -> None:
    questions = tmp_path / "qa.jsonl"
    questions.write_text(json.dumps({"question": "Who?", "answers": ["x"]}) + "\n", "utf-8")
    with pytest.raises(ConfigError, match="no question with a passage"):
        run_rerank(questions, [], models=tiny_models)
    row = {"question": "Who?", "answers": ["x"], "passage": {"title": "", "text": "It is x."}}
    questions.write_text(json.dumps(row) + "\n" + json.dumps({**row, "passage": None}) + "\n", "utf-8")
    with pytest.raises(ConfigError, match="has no passages"):
        run_rerank(questions, [questions], models=tiny_models)
