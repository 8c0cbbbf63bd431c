"""The controls on tiny models: every row is there, its scores are those of its answers, and it can be drawn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from knowstore._loaded import LoadedModels
from knowstore.bench import can_plot, plot_controls, plot_training, run_controls
from knowstore.config import GenerationConfig, ModelConfig
from knowstore.errors import ConfigError
from knowstore.experts import Experts, PassageInput, Prompt, combine, expert_output, forced_scores
from knowstore.prompts import passages_prompt, question_prompt
from knowstore.sources import sentence_spans

NAMES = ("Rome", "Lyon", "Ostia")
PLACES = [f"place {number}" for number in range(3)]


def text_of(number: int) -> str:
    return f"{NAMES[number]} is a town. It lies at place {number}."


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [
        {
            "question": f"Where does {name} lie?",
            "answers": [PLACES[number]],
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
        forced = forced_scores(loaded.llm, prompts, PLACES, None, 0, GenerationConfig())
        assert row["forced"] == pytest.approx(sum(forced) / 3)
    if not can_plot():
        pytest.skip("extra `plots` is not installed")
    plot_controls(rows, tmp_path / "controls.png")
    assert (tmp_path / "controls.png").read_bytes().startswith(b"\x89PNG")


def test_forced_scores_are_of_what_is_mounted(
    tiny_models: ModelConfig, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Experts | None, int]] = []

    def noted(*arguments: Any) -> list[float]:
        calls.append((arguments[3], arguments[4]))
        return forced_scores(*arguments)

    monkeypatch.setattr("knowstore.experts.forced_scores", noted)
    rows = run_controls([questions], models=tiny_models, limit=3, max_tokens=2)["rows"]
    assert isinstance(rows, list)
    by_row = dict(zip([(row["method"], row["control"]) for row in rows], calls, strict=True))
    assert by_row["base", "none"][0] is None
    mounted, layer = by_row["tokens, passages", "gold"]
    assert mounted is not None

    loaded = LoadedModels(tiny_models)
    network = loaded.hypernetwork
    order = list(range(3))
    random.Random(0).shuffle(order)  # as `run_controls` draws them
    inputs = [PassageInput(NAMES[n], text_of(n), tuple(sentence_spans(text_of(n)))) for n in order]
    expected = combine(
        [[(expert, 1.0, None)] for expert in network.generate(loaded.llm, inputs)],
        device=loaded.llm.device, dtype=loaded.llm.dtype, static=network.static, query=network.query,
        max_norm=network.config.max_norm,
    )  # fmt: skip
    x = torch.randn(1, 4, loaded.llm.embeddings.shape[1], generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    outputs = [expert_output(one, x) for one in (mounted, expected)]
    assert layer == network.config.layer
    torch.testing.assert_close(*outputs)
    assert all(not torch.allclose(outputs[1][n], outputs[1][n - 1], atol=0.01) for n in range(3))


def test_methods_that_are_named_are_measured_alone(tiny_models: ModelConfig, questions: Path) -> None:
    asked = {"models": tiny_models, "limit": 3, "max_tokens": 2}
    every = run_controls([questions], **asked)["rows"]
    some = run_controls([questions], methods=["rag", "tokens"], **asked)["rows"]
    assert isinstance(every, list)
    assert some == [row for row in every if row["method"] in ("rag", "tokens")]
    with pytest.raises(ConfigError, match="no method 'tokns'") as refused:
        run_controls([questions], methods=["tokns"], **asked)
    assert refused.value.fix.startswith("name some of: base; rag; tokens;")
    short = questions.with_name("short.jsonl")
    rows = [json.loads(line) for line in questions.read_text("utf-8").splitlines()]
    for number, row in enumerate(rows):
        row["passage"]["text"] = f"It lies on hill {number} near {row['answers'][0]}"
    short.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    both = run_controls([questions, short], methods=["tokens, sentences"], **asked)["rows"]
    assert isinstance(both, list)
    assert {row["data"] for row in both} == {questions.name}
    with pytest.raises(ConfigError, match="no passage of these files has sentences"):
        run_controls([short], methods=["tokens, sentences"], **asked)


def test_rows_without_answers_are_left_out(tiny_models: ModelConfig, questions: Path) -> None:
    with questions.open("a") as file:
        file.write('{"question": "Who?", "answers": [], "passage": {"title": "", "text": "Nobody."}}\n')
    rows = run_controls([questions], models=tiny_models, limit=4, max_tokens=2)["rows"]
    assert isinstance(rows, list)
    assert {row["n"] for row in rows} == {3}


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
