"""Methods side by side on tiny models: every method answers everything, and the LLM is left as it was."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from knowstore._loaded import LoadedModels
from knowstore.baselines import METHODS, Edit, EditQuestion, usable_methods
from knowstore.baselines.read import ReadPassages
from knowstore.baselines.search import TaughtSearch
from knowstore.bench import can_plot, plot_methods, run_methods
from knowstore.bench.memory import PeakMemory
from knowstore.cli.app import app
from knowstore.config import ModelConfig, RetrievalConfig
from knowstore.errors import ConfigError
from knowstore.experts import FrozenLLM, load_llm
from knowstore.records import Passage


def _write(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    rows: list[dict[str, object]] = [
        {
            "id": name,
            "subject": name,
            "prompt": f"{name} lies in",
            "target_new": f"place {number}",
            "target_old": "Italy",
            "paraphrases": [f"One finds {name} in"],
            "neighbourhood": [{"prompt": "Ostia lies in", "target": "Italy"}],
        }
        for number, name in enumerate(("Rome", "Lyon"))
    ]
    return _write(tmp_path / "edits.jsonl", rows)


@pytest.mark.parametrize("is_sequential", [False, True])
def test_every_method_answers_every_probe(
    tiny_models: ModelConfig, edits: Path, tmp_path: Path, is_sequential: bool
) -> None:
    methods = ["rag", "experts", "found", "read"]
    reached: list[int] = []
    found = run_methods(
        [edits], methods=methods, models=tiny_models, is_sequential=is_sequential, max_tokens=2, cache_dir=tmp_path,
        on_found=lambda some: reached.append(len(list(some["costs"]))),  # type: ignore[call-overload]
    )  # fmt: skip
    assert reached == [1, 2, 3, 4, 5]
    rows, costs, answers = found["rows"], found["costs"], found["answers"]
    assert isinstance(rows, list)
    assert isinstance(costs, list)
    assert isinstance(answers, list)
    shown = ["base", "rag", "tokens", "tokens + rag", "tokens, found", "tokens, found + rag", "rag, found"]
    kinds = ["efficacy", "paraphrase", "neighbourhood"]
    assert [(row["method"], row["kind"]) for row in rows] == [(method, kind) for method in shown for kind in kinds]
    assert all(row["unchanged"] == 1.0 for row in rows if row["method"] == "base")
    assert all(0 <= row["forced_ci"][0] <= row["forced"] <= row["forced_ci"][1] <= 1 for row in rows)
    assert len(answers) == len(shown) * 6
    assert [cost["method"] for cost in costs] == ["base", "rag", "tokens", "tokens, found", "rag, found"]
    assert costs[2]["kept_bytes_per_passage"] > 0
    if not can_plot():
        pytest.skip("extra `plots` is not installed")
    plot_methods(rows, costs, tmp_path / "methods.png")
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")


def test_of_passages_that_say_nearly_the_same_the_newest_is_found_as_by_ask(tiny_models: ModelConfig) -> None:
    models = LoadedModels(tiny_models)
    texts = ["Rome lies on the river Tiber in Italy.", "Rome lies on the river Arno in Italy."]
    edits = [Edit(Passage(text, "Rome"), ()) for text in (*texts, texts[0])]
    question = EditQuestion("Where does Rome lie?", (0, 1))
    chosen = {}
    for finds in (True, False):
        search = TaughtSearch(models, finds_passages=finds)
        taught = [search.index(edit.passage) for edit in edits]
        chosen[finds] = [one.text for one in search.choose(taught, [question])[0]]
    assert chosen[True] == [texts[0]]
    assert sorted(chosen[False]) == sorted(texts)


def test_a_passage_that_was_taught_often_takes_the_place_of_no_other(tiny_models: ModelConfig) -> None:
    search = TaughtSearch(LoadedModels(tiny_models), finds_passages=True)
    often, once = search.index(Passage("The river Tiber flows.", "Rome")), search.index(Passage("Lyon is old.", "Lyon"))
    vector = often.item.vector
    assert vector is not None
    assert search._found([once, *[often] * RetrievalConfig.n_candidates], vector) == [RetrievalConfig.n_candidates, 0]


def test_passages_that_were_found_are_read_with_the_reader_where_there_is_one(
    tiny_models: ModelConfig, tiny_reader_dir: Path
) -> None:
    edit = Edit(Passage("Rome lies on the river Tiber in Italy.", "Rome"), ())
    for reader in ("none", str(tiny_reader_dir)):
        models = LoadedModels(replace(tiny_models, reader=reader))
        with ReadPassages(models).teaching(models.llm) as teach:
            edited = teach([edit])
            assert edited.serve is not None
            served = edited.serve([EditQuestion("Where does Rome lie?", (0,))])
        assert [[one.text for one in some] for some in served.passages or ()] == [[edit.passage.text]]
        assert (served.experts is None) == (reader == "none")


def test_loading_the_model_is_not_what_the_first_method_takes(
    tiny_models: ModelConfig, edits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_late(path: Path, **options: Any) -> FrozenLLM:
        time.sleep(0.5)
        return load_llm(path, **options)

    monkeypatch.setattr("knowstore.experts.load_llm", load_late)
    found: Any = run_methods([edits], methods=["rag"], models=tiny_models, limit=1, max_tokens=2, cache_dir=tmp_path)
    assert found["seconds"] > 0.5
    assert all(cost["prepare_s"] < 0.5 for cost in found["costs"])


def test_memit_without_a_corpus_says_what_to_give(tiny_models: ModelConfig, edits: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MEMIT needs a corpus") as caught:
        run_methods([edits], methods=["memit"], models=tiny_models, cache_dir=tmp_path)
    assert caught.value.fix.endswith("with --corpus")


def test_a_method_that_is_not_there_is_named(tiny_models: ModelConfig, edits: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no method 'magic'"):
        run_methods([edits], methods=["magic"], models=tiny_models, cache_dir=tmp_path)


def test_the_command_writes_figures_and_answers(tiny_models: ModelConfig, edits: Path, tmp_path: Path) -> None:
    options = [f"--{role}={getattr(tiny_models, role)}" for role in ("llm", "retriever", "reranker", "hypernetwork")]
    out = tmp_path / "out"
    ran = CliRunner().invoke(
        app, [*options, "bench", "methods", "--edits", str(edits), "--method", "rag", "--output", str(out), "--json"]
    )
    assert ran.exit_code == 0, ran.output
    shown = json.loads(ran.stdout)
    assert {"rows", "costs", "answers", "seconds"} == set(shown)
    assert json.loads((out / "methods.json").read_text("utf-8"))["rows"] == shown["rows"]


def test_what_is_evaluated_is_never_trained_on(tiny_models: ModelConfig, edits: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mend needs edits to train its network on"):
        run_methods([edits], methods=["mend"], train=[edits], models=tiny_models, cache_dir=tmp_path)


def test_the_peak_is_that_of_the_block_alone() -> None:
    kept = []
    with PeakMemory("cpu") as large:
        kept.append(bytearray(b"x" * 200_000_000))
        kept.clear()
    with PeakMemory("cpu") as small:
        pass
    if large.bytes is None or small.bytes is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert large.bytes - small.bytes > 150_000_000


def test_methods_that_lack_something_are_named_with_what_they_lack(tmp_path: Path) -> None:
    lacks = usable_methods([], [])
    assert [name for name, lack in lacks.items() if lack.startswith("--")] == ["memit", "mend", "malmen"]
    assert not any(lack.startswith("--") for lack in usable_methods([tmp_path], [tmp_path]).values())


def test_the_commands_name_every_method() -> None:
    for name in ("methods", "sequence"):
        shown = CliRunner().invoke(app, ["bench", name, "--help"]).stdout
        told = {"base", "rag", "experts"} if name == "sequence" else set()  # of use to compare with alone
        assert all(re.search(rf"\b{method}\b", shown) for method in METHODS.keys() - told), shown


def test_the_command_wants_something_to_measure() -> None:
    assert CliRunner().invoke(app, ["bench", "methods"]).exit_code == 2
