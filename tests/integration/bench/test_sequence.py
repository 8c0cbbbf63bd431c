"""A sequence of edit batches on tiny models: what is asked when, who survives, and what is drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from knowstore.bench import SequenceConfig, can_plot, plot_sequence, run_methods, run_sequence
from knowstore.bench.sequence import why_lost
from knowstore.bench.teaching import AskedCases
from knowstore.cli.app import app
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError

SMALL = SequenceConfig(n_batches=2, n_rows=2, max_tokens=8)


NAMES = ("Rome", "Lyon", "Ostia", "Troy", "Tours")


def write(file: Path, answers: Sequence[str]) -> Path:
    """Questions on passages, with these answers."""
    rows = [
        {
            "question": f"Where does {name} lie?",
            "answers": [answer],
            "passage": {"title": name, "text": f"{name} lies on the river {name[::-1]} and {name[1:]}."},
        }
        for name, answer in zip(NAMES, answers, strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    return write(tmp_path / "edits.jsonl", NAMES)


def test_after_each_batch_all_questions_so_far_are_asked(tiny_models: ModelConfig, edits: Path, tmp_path: Path) -> None:
    told: Any = run_methods([edits], methods=["rag"], models=tiny_models, limit=4, max_tokens=8, cache_dir=tmp_path)
    kinds = [row for row in told["answers"] if row["method"] == "rag" and row["kind"] == "efficacy"]
    said = {row["question"]: row["answer"] for row in kinds}
    right = [said.get(f"Where does {name} lie?", name) for name in NAMES]  # of the row that is not drawn any answer
    known = write(edits, right)
    reached: list[int] = []
    found: Any = run_sequence(
        known, config=SMALL, methods=["rag"], models=tiny_models, cache_dir=tmp_path,
        on_found=lambda some: reached.append(len(cast(list[object], some["methods"]))),
    )  # fmt: skip
    assert reached == [0, 1]
    base, rag = ([row for row in found["rows"] if row["method"] == name] for name in ("base", "rag"))
    assert [(row["after"], row["n"], row["survives"]) for row in base] == [(1, 2, None), (2, 4, None)]
    assert [(row["after"], row["n"], row["survives"]) for row in rag] == [(1, 2, True), (2, 4, True)]
    assert [row["em"] for row in rag] == [1.0, 1.0]
    assert [row["gain"] for row in rag] == pytest.approx([1.0 - row["f1"] for row in base])
    [method] = found["methods"]
    assert (method["matrix"], method["matrix_n"]) == ([[1.0, None], [1.0, 1.0]], [[2, 0], [2, 2]])
    assert (method["survived"], method["why"], method["bwt"]) == (2, "", 0.0)


def test_a_method_that_knows_nothing_is_taught_no_more(tiny_models: ModelConfig, edits: Path, tmp_path: Path) -> None:
    found: Any = run_sequence(
        edits, config=SMALL, methods=["rag", "found", "read"], models=tiny_models, cache_dir=tmp_path
    )
    rag = next(method for method in found["methods"] if method["method"] == "rag")
    assert (rag["survived"], rag["why"]) == (0, "it knows no more than the untouched model")
    assert [method["method"] for method in found["methods"]] == ["rag", "tokens, found", "rag, found"]
    assert len(rag["matrix"]) == len([row for row in found["rows"] if row["method"] == "rag"]) == 1
    if not can_plot():
        pytest.skip("extra `plots` is not installed")
    plot_sequence(found, tmp_path / "sequence.png")
    assert (tmp_path / "sequence.png").read_bytes().startswith(b"\x89PNG")


def test_of_what_is_to_be_left_alone_only_taught_passages_are_mounted_or_read(
    tiny_models: ModelConfig, edits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nats(asked: AskedCases, *_: object) -> list[float]:
        left.append([len(case.edits) for case in asked.cases])
        assert [len(case.passages) for case in asked.cases] == left[-1]
        return real(asked, *_)

    left: list[list[int]] = []
    real = AskedCases.nats
    monkeypatch.setattr(AskedCases, "nats", nats)
    monkeypatch.setattr("knowstore.bench.sequence.why_lost", lambda *_: "")
    found: Any = run_sequence(edits, config=SMALL, methods=["rag", "experts"], models=tiny_models, cache_dir=tmp_path)
    assert left == [[0] * 4] + [[1, 1, 0, 0], [1] * 4] * 2
    assert [row["unrelated"] > 0 for row in found["rows"]] == [True] * 6


@pytest.mark.parametrize(
    ("gain_low", "unrelated", "said"),
    [
        (0.01, 4.6, ""),
        (0.0, 4.0, "knows no more"),
        (0.01, 4.7, "left alone"),
        (0.01, float("nan"), "left alone"),
        (0.01, None, ""),
    ],
)
def test_a_method_survives_when_it_knows_and_speaks(gain_low: float, unrelated: float | None, said: str) -> None:
    why = why_lost(gain_low, unrelated, 4.0)
    assert said in why
    assert bool(said) == bool(why)


def test_too_few_edits_are_refused(tiny_models: ModelConfig, edits: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 5 edits, too few for 6 batches of 10"):
        run_sequence(edits, methods=["rag"], models=tiny_models, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="0 batches"):
        SequenceConfig(n_batches=0)


def test_the_command_writes_what_it_found(tiny_models: ModelConfig, edits: Path, tmp_path: Path) -> None:
    options = [f"--{role}={getattr(tiny_models, role)}" for role in ("llm", "retriever", "reranker", "hypernetwork")]
    sized = ["--method", "rag", "--batches", "2", "--edits", "1", "--output", str(tmp_path / "out"), "--json"]
    ran = CliRunner().invoke(app, [*options, "bench", "sequence", "--data", str(edits), *sized])
    assert ran.exit_code == 0, ran.output
    assert json.loads((tmp_path / "out" / "sequence.json").read_text("utf-8")) == json.loads(ran.stdout)
    plain = CliRunner().invoke(app, [*options, "bench", "sequence", "--data", str(edits), *sized[:-3]])
    assert plain.exit_code == 0, plain.output
    assert "survived" in plain.stdout
