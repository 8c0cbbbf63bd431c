"""The commands on a real store with tiny random models: ingest, ask, browse, edit, keep."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from knowstore.cli.app import app
from knowstore.config import ModelConfig
from knowstore.errors import CatalogError
from knowstore.experts import PooledConfig, PooledHypernetwork, ReaderConfig, ReaderHypernetwork
from knowstore.store import KnowledgeStore

Run = Callable[..., Result]

FACTS = (
    {"title": "Rome", "text": "Rome was founded in 753 BC. It lies on the river Tiber.", "date": "2020-01-02"},
    {"title": "Lyon", "text": "Lyon lies on the Rhône and the Saône.", "date": "2021-01-02"},
    {"title": "Paris", "text": "Paris lies on the Seine. Romulus did not found it.", "date": "2022-01-02"},
)


@pytest.fixture
def run(tmp_path: Path, tiny_models: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `knowstore` in `tmp_path`; the models are named in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("STORE", "CATALOG"):
        monkeypatch.delenv(f"KNOWSTORE_{name}", raising=False)
    for name in ("llm", "retriever", "reranker", "hypernetwork", "device", "dtype"):
        monkeypatch.setenv(f"KNOWSTORE_{name.upper()}", getattr(tiny_models, name))
    Path("facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FACTS), encoding="utf-8")

    def invoke(*arguments: str, stdin: str | bytes | None = None, status: int = 0) -> Result:
        result = CliRunner().invoke(app, list(arguments), input=stdin)
        assert result.exit_code == status, result.output
        return result

    return invoke


def _json(result: Result) -> dict[str, Any]:
    record = json.loads(result.stdout)
    assert isinstance(record, dict)
    return record


def test_ingest_then_ask_then_edit(run: Run) -> None:
    plan = _json(run("--json", "ingest", "facts.jsonl", "--dry-run"))
    assert (plan["passages_added"], plan["passages_unchanged"]) == (3, 0)
    assert not Path(".knowstore").exists()

    report = _json(run("ingest", "facts.jsonl", "--json", "--codec", "float32"))
    assert set(report) >= {
        "batch_id", "passages_added", "passages_unchanged", "passages_superseded", "failures", "seconds"
    }  # fmt: skip
    assert (report["batch_id"], report["passages_added"], report["failures"]) == (1, 3, [])
    again = run("ingest", "facts.jsonl")
    assert again.stdout.startswith("Nothing changed: 3 passages already in the store")
    run("ingest", "facts.jsonl", "--codec", "int8", status=2)

    answer = _json(run("ask", "When was Rome founded?", "--json", "--no-null", "--top-k", "2"))
    assert set(answer) >= {"answer", "mode", "experts", "timings_s"}
    assert set(answer["experts"][0]) >= {"passage_id", "weight", "score", "batch_id", "source"}
    assert sum(expert["weight"] for expert in answer["experts"]) == pytest.approx(1)
    nulled = _json(run("ask", "When?", "--json", "--null-threshold", "1e9"))
    assert (nulled["experts"], nulled["is_null"]) == ([], True)
    explained = run("ask", "When was Rome founded?", "--mode", "rag", "--explain", "--max-tokens", "3", "--no-null")
    assert "passage\tretrieval\trerank\tweight" in explained.stdout
    assert "stage\tseconds" in explained.stdout
    assert "for tests" in explained.stderr
    Path("questions.txt").write_text("Where is Lyon?\n\nWhy?\n", encoding="utf-8")
    Path("questions.jsonl").write_text('{"question": "Where is Lyon?"}\n{"question": "Why?"}\n', encoding="utf-8")
    from_text, from_rows = (
        [json.loads(line) for line in run("ask", "--json", "--questions", name).stdout.splitlines()]
        for name in ("questions.txt", "questions.jsonl")
    )
    assert [one["question"] for one in from_text] == ["Where is Lyon?", "Why?"]
    assert [one["answer"] for one in from_text] == [one["answer"] for one in from_rows]
    assert "Fix: " in run("ask", "--questions", "nowhere.txt", status=1).stderr
    run("ask", "Why?", "--questions", "questions.txt", status=2)
    lines = run("ask", "--json", "--title", "Ly*", stdin="Where is Lyon?\n\nWhy?\n").stdout.splitlines()
    assert len(lines) == 2
    assert {hit["title"] for hit in json.loads(lines[0])["experts"]} <= {"Lyon"}

    listed = _json(run("list", "--json", "--limit", "2"))
    assert len(listed["passages"]) == 2
    assert listed["has_more"]
    ids = run("list", "--quiet").stdout.split()
    assert len(ids) == 3
    shown = _json(run("show", ids[0], "--json"))
    assert set(shown) >= {"passage_id", "title", "text", "source", "batch_id", "state", "expert"}
    assert shown["expert"]["codec"] == "float32"
    assert set(_json(run("stats", "--json"))) >= {"passages", "experts", "batches", "bytes"}

    run("remove", ids[0], status=2)
    assert _json(run("remove", ids[0], "--dry-run", "--json"))["removed"] == 1
    assert len(run("list", "--quiet").stdout.split()) == 3
    removed = _json(run("remove", ids[0], "--yes", "--json"))
    assert removed == {"batch_id": 2, "removed": 1, "purged": False}
    restored = _json(run("rollback", "2", "--json"))
    assert restored == {"batch_id": 3, "restored": 1, "removed": 0}
    new = "replace", ids[1], "--text", "Lyon lies on two rivers.", "--yes", "--quiet"
    assert "a date that is none" in run(*new, "--date", "last week", status=1).stderr
    replaced = run(*new, "--date", "3 May 2024").stdout.strip()
    shown = run("show", replaced).stdout
    assert "Lyon lies on two rivers." in shown
    assert "2024-05-03" in shown
    purged = _json(run("remove", ids[2], "--purge", "--yes", "--json"))
    assert purged == {"batch_id": 5, "removed": 1, "purged": True}

    batches = _json(run("batches", "--json"))["batches"]
    assert [batch["kind"] for batch in batches] == ["remove", "replace", "rollback", "remove", "ingest"]
    assert {item["change"] for item in _json(run("batches", "4", "--json"))["items"]} == {"added", "removed"}
    assert _json(run("verify", "--json"))["clean"] is True
    assert run("db", "check").stdout == "Clean\n"
    assert _json(run("db", "current", "--json"))["current"] == _json(run("db", "upgrade", "--json"))["current"]

    probes = [
        {"question": "Où?", "answers": ["a"], "kind": "reliability", "passage_id": replaced},
        {"question": "What was?", "answers": ["a"], "kind": "reliability", "passage_id": ids[1]},
        {"question": "Who wrote Faust?", "answers": [], "kind": "locality"},
    ]
    Path("probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in probes), "utf-8")
    run("probes", "add", "probes.jsonl")
    exported = _json(run("export", "backup", "--json"))
    assert (exported["passages"], exported["probes"]) == (2, 2)
    imported = _json(run("--store", "copy", "import", "backup", "--json"))
    assert (imported["passages_added"], imported["probes_added"], imported["failures"]) == (2, 2, [])
    asked = [one["question"] for one in _json(run("--store", "copy", "probes", "list", "--json"))["probes"]]
    assert asked == ["Où?", "Who wrote Faust?"]
    assert _json(run("--store", "copy", "import", "backup", "--json"))["probes_known"] == 2
    assert "2 passages" in run("stats", "--store", "copy").stdout


def test_inputs_that_cannot_be_read_are_reported_and_the_rest_goes_on(run: Run) -> None:
    Path("empty.txt").write_text("", encoding="utf-8")
    result = run("ingest", "facts.jsonl", "empty.txt", "missing.txt")
    assert "2 inputs could not be read" in result.stderr
    assert result.stdout.startswith("Edit batch 1: 3 passages, 3 experts (")
    assert "Hint: undo it with `knowstore rollback 1`" in result.stderr
    error = _json(run("ingest", "missing.txt", "--strict", "--json", status=1))["error"]
    assert set(error) == {"what", "kept", "fix"}


def test_text_from_stdin_and_mapped_columns(run: Run) -> None:
    Path("table.csv").write_text("headline,body\nNile,The Nile is a river in Africa.\n", encoding="utf-8")
    columns = "text=body,title=headline"
    assert _json(run("ingest", "table.csv", "--columns", columns, "--json"))["passages_added"] == 1
    assert _json(run("ingest", "-", "--json", stdin="The Po is a river in Italy."))["passages_added"] == 1


def test_a_store_that_is_missing_is_an_error_with_a_fix(run: Run) -> None:
    result = run("ask", "why?", status=1)
    assert "Fix: " in result.stderr
    assert _json(run("stats", "--json", status=1))["error"]["what"].startswith("there is no store")


def test_models_and_doctor_say_what_resolves(run: Run) -> None:
    models = {model["role"]: model for model in _json(run("models", "list", "--json"))["models"]}
    assert models["llm"]["state"] == "ready"
    assert models["hypernetwork"]["notes"] == "for tests"
    checks = _json(run("doctor", "--json"))
    assert checks["ok"] is True
    broken = _json(run("doctor", "--json", "--llm", "./nowhere", status=1))
    assert {check["name"] for check in broken["checks"] if check["state"] == "problem"} == {"llm"}


def test_probes_are_audited_and_reported(run: Run) -> None:
    probes = [
        {"question": f"Where is {fact['title']}?", "answers": [fact["title"]], "kind": "reliability"} for fact in FACTS
    ]
    lines = [json.dumps(row) for row in [*probes, {**probes[0], "kind": "opinion"}]]
    Path("probes.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run("ingest", "facts.jsonl", "--probes", "probes.jsonl", "--strict", status=1)
    report = _json(run("ingest", "facts.jsonl", "--probes", "probes.jsonl", "--audit", "--json"))
    assert (report["passages_added"], report["probes_added"], report["audit"]["n"]) == (3, 3, 3)
    assert [failure["source"] for failure in report["failures"]] == ["probes.jsonl:4"]
    assert "0 probes added, 3 known already" in run("probes", "add", "probes.jsonl").stdout
    listed = _json(run("probes", "list", "--json", "--batch", "1"))["probes"]
    assert [row["question"] for row in listed] == [row["question"] for row in probes]
    made = _json(run("probes", "make", "--limit", "1", "--output", "made.jsonl", "--json"))
    assert made["tried"] == made["kept"] + sum(made["refused"].values()) == 1

    run("remove", run("list", "--quiet").stdout.split()[0], "--yes")
    audit = _json(run("audit", "--mode", "hybrid", "--sample", "2", "--json"))
    assert set(audit) >= {
        "matrix", "matrix_f1", "batches", "average", "bwt", "locality", "contradictions", "residue"
    }  # fmt: skip
    assert (audit["batch_id"], audit["batches"], audit["n"]) == (2, [1], 2)
    text = run("audit", "--batches", "1,5-7").stdout
    assert text.startswith("Audit 3 after edit batch 2: 3 probes")
    assert "after batch\tEM of 1\n" in text
    run("audit", "--batches", "first", status=2)
    assert "no audit was cut short" in run("audit", "--resume", status=1).stderr

    files = _json(run("report", "--output", "report.html", "--json"))["files"]
    assert files == ["report.html", "report.json", "report.csv", "report.md"]
    assert [mode["mode"] for mode in json.loads(Path("report.json").read_text("utf-8"))["modes"]] == [
        "experts", "hybrid"
    ]  # fmt: skip


def test_passages_are_listed_by_the_path_that_was_ingested(run: Run) -> None:
    run("ingest", "facts.jsonl")
    for source in ("facts.jsonl", "./facts.jsonl", str(Path("facts.jsonl").resolve())):
        assert len(run("list", "--source", source, "--quiet").stdout.split()) == 3
    Path("facts.jsonl").unlink()
    assert len(run("list", "--source", "facts.jsonl", "--quiet").stdout.split()) == 3
    assert run("list", "--source", "fact", "--quiet").stdout == ""
    for source in ("facts.jsonl", "./fact*", f"{Path.cwd()}/*"):
        answer = _json(run("ask", "Where is Lyon?", "--source", source, "--no-null", "--json"))
        assert {one["source"] for one in answer["experts"]} == {str(Path("facts.jsonl").resolve())}
    assert _json(run("ask", "Where is Lyon?", "--source", "other*", "--no-null", "--json"))["experts"] == []


def test_a_question_from_stdin_that_is_no_text_is_answered_like_any_other(run: Run) -> None:
    run("ingest", "facts.jsonl")
    asked = run("ask", "--json", stdin=b"Where is Ly\xf4n?\nWhere is Lyon?\n").stdout.splitlines()
    assert [json.loads(line)["question"] for line in asked] == ["Where is Ly\ufffdn?", "Where is Lyon?"]


def test_a_dry_run_refuses_what_the_command_would_refuse(run: Run) -> None:
    run("ingest", "facts.jsonl")
    passage_id = run("list", "--quiet").stdout.split()[0]
    run("remove", passage_id, "--yes")
    for command in (("remove", passage_id), ("replace", passage_id, "--text", "Lyon lies elsewhere.")):
        for more in ("--dry-run", "--yes"):
            assert "was removed already" in run(*command, more, status=1).stderr
    run("remove", passage_id, "--purge", "--dry-run")
    passage_id = run("list", "--quiet").stdout.split()[0]
    for more in ("--dry-run", "--yes"):
        assert "without text" in run("replace", passage_id, "--text", " ", more, status=1).stderr


def test_a_codec_counts_until_the_store_keeps_one(run: Run) -> None:
    run("ingest", "mistyped.jsonl", "--codec", "latent", status=1)
    run("ingest", "facts.jsonl", "--codec", "float32")
    run("ingest", "facts.jsonl", "--codec", "float32")
    assert "float32" in run("ingest", "facts.jsonl", "--codec", "latent", status=2).stderr


def test_questions_of_a_file_may_have_blank_lines_and_a_byte_order_mark(run: Run) -> None:
    run("ingest", "facts.jsonl")
    Path("q.jsonl").write_text('\ufeff{"question": "Where is Lyon?"}\n\n', encoding="utf-8")
    Path("q.txt").write_text("\ufeffWhere is Lyon?\n\n", encoding="utf-8")
    for path in ("q.jsonl", "q.txt"):
        [asked] = run("ask", "--questions", path, "--json").stdout.splitlines()
        assert json.loads(asked)["question"] == "Where is Lyon?"


def test_a_store_finds_its_models_from_another_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {}
    for role in ("llm", "retriever", "hypernetwork"):
        Path(role).symlink_to(os.environ[f"KNOWSTORE_{role.upper()}"])
        named[role] = str(Path(role).resolve())
        monkeypatch.setenv(f"KNOWSTORE_{role.upper()}", role)
    run("ingest", "facts.jsonl")
    store = str(Path(".knowstore").resolve())
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for role in named:
        monkeypatch.delenv(f"KNOWSTORE_{role.upper()}")
    assert "experts" in _json(run("ask", "Where is Lyon?", "--store", store, "--json"))
    monkeypatch.setattr(KnowledgeStore, "open", lambda *_, **__: pytest.fail("opening a store mends and migrates it"))
    models = _json(run("models", "list", "--store", store, "--json"))["models"]
    assert {model["role"]: model["path"] for model in models}.items() >= named.items()
    checks = {check["name"]: check for check in _json(run("doctor", "--store", store, "--json"))["checks"]}
    assert all(path in checks[role]["detail"] for role, path in named.items())


def test_passages_longer_than_an_expert_reads_are_told(run: Run) -> None:
    assert "tokens of a passage" in run("ingest", "facts.jsonl", "--words", "500").stderr
    assert "tokens of a passage" not in run("ingest", "facts.jsonl", "--words", "20").stderr


def test_a_bench_whose_folder_cannot_be_made_measures_nothing(run: Run) -> None:
    _write_questions()
    Path("taken").write_text("", encoding="utf-8")
    result = run("bench", "controls", "--data", "qa.jsonl", "--output", "taken", status=1)
    assert (result.stdout, "taken" in result.stderr) == ("", True)


@pytest.mark.parametrize("option", ["--limit", "--offset"])
def test_numbers_that_no_catalog_can_hold_are_wrong_usage(run: Run, option: str) -> None:
    run("ingest", "facts.jsonl")
    for command in ("batches", "list"):
        assert option in run(command, option, "9" * 30, status=2).stderr


def test_an_ingest_is_told_before_the_audit_that_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("probes.jsonl").write_text('{"question": "Where?", "answers": ["here"], "kind": "reliability"}\n', "utf-8")

    def fail(*_: object, **__: object) -> None:
        raise CatalogError("it broke", "the answers", "mend it")

    monkeypatch.setattr("knowstore.audits.run_audit", fail)
    how = ("ingest", "--probes", "probes.jsonl", "--audit")
    plain = run(*how, "facts.jsonl", status=1)
    assert plain.stdout.startswith("Edit batch 1: 3 passages")
    assert "1 probe added" in plain.stdout
    assert plain.stderr.index("rollback 1") < plain.stderr.index("Error: it broke")
    assert run(*how, "facts.jsonl", "--store", "quiet", "--quiet", status=1).stdout == "1\n"
    record = _json(run(*how, "facts.jsonl", "--store", "json", "--json", status=1))
    assert (record["batch_id"], record["probes_added"], record["error"]["what"]) == (1, 1, "it broke")


def test_an_ingest_of_nothing_into_an_empty_store_tells_so_before_its_probes_fail(run: Run) -> None:
    Path("probes.jsonl").write_text('{"question": "Where?", "answers": ["here"], "kind": "reliability"}\n', "utf-8")
    how = ("ingest", "missing.txt", "--probes", "probes.jsonl", "--audit")
    plain = run(*how, status=1)
    assert plain.stdout.startswith("Nothing changed: 0 passages already in the store")
    assert "holds nothing that could be asked for" in plain.stderr
    assert _json(run(*how, "--json", status=1))["batch_id"] is None
    assert "there are no probes" in run("ingest", "missing.txt", "--audit", status=1).stderr


@pytest.mark.parametrize("option", [("--probes", "probes.jsonl"), ("--audit",)])
def test_a_dry_run_takes_neither_probes_nor_an_audit(run: Run, option: tuple[str, ...]) -> None:
    refused = run("ingest", "facts.jsonl", "--dry-run", *option, status=2)
    assert "--dry-run" in refused.stderr
    assert "neither keeps probes nor audits" in refused.stderr
    assert not Path(".knowstore").exists()


def test_the_benches_report_numbers(run: Run) -> None:
    rows = [{"question": f"Where is {fact['title']}?", "answers": [fact["title"]], "passage": fact} for fact in FACTS]
    Path("qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    controls = ["bench", "controls", "--data", "qa.jsonl", "--limit", "2", "--json"]
    scores = _json(run(*controls))["rows"]
    assert {row["method"] for row in _json(run(*controls, "--method", "rag"))["rows"]} == {"rag"}
    assert set(scores[0]) >= {"data", "method", "control", "n", "em", "em_ci", "f1", "f1_ci", "forced", "forced_ci"}
    assert {row["control"] for row in scores} >= {"none", "static", "shuffled", "gold"}
    how = ["--data", "qa.jsonl", "--batches", "1", "--passages", "3", "--unrelated", "qa.jsonl", "--n-unrelated", "1"]
    lived = _json(run("bench", "edits", *how, "--output", "lived", "--json"))
    assert (lived["passages"], [audit["n"] for audit in lived["audits"]], lived["locality"]["n"]) == (3, [4], 1)
    run("ingest", "facts.jsonl")
    assert run("bench", "ask", "--questions", "qa.jsonl", "--limit", "2").stdout.startswith(
        "experts\tstage\tp50\tp95\n"
    )


def test_speed_is_measured_beside_what_one_would_use_instead(run: Run) -> None:
    facts = [{"title": f"Place {n}", "text": f"{FACTS[0]['text']} It is number {n}."} for n in range(24)]
    Path("places.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts), encoding="utf-8")
    how = ["--limit", "24", "--rounds", "2", "--tokens", "3", "--top-k", "1,4,8", "--sizes", "20,30", "--output", "out"]
    found = _json(run("bench", "speed", "--corpus", "places.jsonl", *how, "--json"))
    ratios = {row["name"]: row for row in found["ratios"]}
    assert ratios.keys() >= {
        "ttft_rag_over_experts_k4", "total_rag_over_experts_k4", "experts_k1_over_bare", "experts_k8_over_bare",
        "ingest_over_pure_forwards", "read_memory_30_over_20",
    }  # fmt: skip
    assert all(0 < row["low"] <= row["high"] for row in ratios.values())
    assert found["startup"]["help_s"] < found["startup"]["first_ask_s"]
    assert json.loads(Path("out/speed.json").read_text("utf-8"))["ratios"] == found["ratios"]
    assert "whole numbers" in run("bench", "speed", "--corpus", "places.jsonl", "--sizes", "many", status=2).stderr
    few = ["--limit", "24", "--rounds", "1", "--tokens", "2", "--top-k", "1", "--sizes", ""]
    assert _json(run("bench", "speed", "--corpus", "places.jsonl", *few, "--json"))["reads"] == []


def _write_questions() -> None:
    """24 questions on as many passages, in qa.jsonl."""
    rows = [
        {"question": f"Where is {fact['title']} {n}?", "answers": [fact["title"]],
         "passage": {"title": "Map", "text": f"{fact['text']} It is number {n}."}}
        for fact in FACTS for n in range(8)
    ]  # fmt: skip
    Path("qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_trained_hypernetwork_answers(run: Run) -> None:
    _write_questions()
    how = ["--data", "qa.jsonl", "--steps", "4", "--batch-questions", "2", "--layer", "1"]
    trained = _json(run("train", "hypernetwork", *how, "--output", "trained", "--json"))
    assert trained["steps"] > 0
    assert {file.name for file in Path("trained").iterdir()} == {"model.safetensors", "config.json", "training"}
    further = _json(run("train", "hypernetwork", *how, "--from", "trained", "--output", "further", "--json"))
    assert further["steps"] == 4
    assert json.loads(Path("further/config.json").read_text("utf-8"))["trained_steps"] == 8
    run("ingest", "facts.jsonl", "--hypernetwork", "trained")
    assert "experts" in _json(run("ask", "Where is Lyon?", "--hypernetwork", "trained", "--json"))
    elsewhere = [*how[:-1], "2", "--encoder-from", "trained"]
    run("train", "hypernetwork", *elsewhere, "--output", "elsewhere")
    assert json.loads(Path("elsewhere/config.json").read_text("utf-8"))["layer"] == 2
    refused = run("train", "hypernetwork", *elsewhere, "--from", "trained", "--output", "other", status=1)
    assert "--from and --encoder-from exclude each other" in refused.stderr


def test_a_hypernetwork_is_trained_by_what_a_reader_of_its_model_reads(run: Run, tiny_reader_dir: Path) -> None:
    _write_questions()
    how = ["--data", "qa.jsonl", "--steps", "1", "--batch-questions", "2", "--layer", "1", "--pointing-share", "0"]
    signals = ["--distil-weight", "0.5", "--contrast-weight", "0.1", "--nothing-weight", "0.1"]
    signals += ["--completion-weight", "0.1", "--n-mounted", "3", "--hard-negatives"]
    run("train", "hypernetwork", *how, *signals, "--reader", str(tiny_reader_dir), "--output", "trained")
    refused = run("train", "hypernetwork", *how, *signals, "--reader", "none", "--output", "other", status=1)
    assert "no reader to distil" in refused.stderr


def test_what_experts_could_carry_is_measured(run: Run) -> None:
    rows = [
        {
            "question": f"What is part {part} of {town}?",
            "answers": ["Loam"],
            "passage": {"title": town, "text": "Loam."},
        }
        for town in ("Varden", "Ostry")
        for part in (1, 2)
    ]
    Path("several.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    how = [
        "--data",
        "several.jsonl",
        "--n-questions",
        "2",
        "--steps",
        "1",
        "--layers",
        "0,2",
        "--activation",
        "softmax",
    ]
    found = _json(run("bench", "ceiling", *how, "--activation", "softmax", "--output", "ceiling", "--json"))
    assert {(tuple(row["layers"]), row["activation"]) for row in found["rows"] if row["start"] == "nothing"} == {
        ((0, 2), "softmax")
    }
    assert json.loads(Path("ceiling/ceiling.json").read_text("utf-8"))["rows"] == found["rows"]
    refused = run("bench", "ceiling", *how[:2], "--layers", "0,x", status=2)
    assert "not whole numbers" in refused.stderr


def test_layers_are_compared(run: Run) -> None:
    _write_questions()
    how = ["--train", "qa.jsonl", "--data", "qa.jsonl", "--layer", "1", "--steps", "1", "--limit", "2"]
    found = _json(run("bench", "layers", *how, "--kind", "pooled", "--output", "sweep", "--json"))
    assert [(row["layer"], row["n"]) for row in found["rows"]] == [(1, 2)]
    assert json.loads(Path("sweep/layers.json").read_text("utf-8"))["rows"] == found["rows"]
    refused = run("bench", "layers", *how, "--encoder-from", "sweep/layer-1", "--output", "other", status=1)
    assert "with the encoder of a pooled one" in refused.stderr


def test_parts_and_signals_are_compared(run: Run, tiny_models: ModelConfig) -> None:
    _write_questions()
    how = ["--data", "qa.jsonl", "--from", tiny_models.hypernetwork, "--limit", "2", "--variant", "whole", "--variant"]
    found = _json(run("bench", "ablation", *how, "no-query", "--minutes", "0", "--output", "parts", "--json"))
    assert [(row["variant"], row["n"], row["steps"]) for row in found["rows"]] == [("whole", 2, 0), ("no-query", 2, 0)]
    trained = ["--train", "qa.jsonl", "--steps", "1", "--output", "signals"]
    found = _json(run("bench", "ablation", *how, "contrast", *trained, "--json"))
    assert [(row["variant"], row["steps"]) for row in found["rows"]] == [("whole", 1), ("contrast", 1)]
    assert json.loads(Path("signals/ablation.json").read_text("utf-8"))["rows"] == found["rows"]
    assert "no questions to train on" in run("bench", "ablation", *how, "contrast", "--output", "x", status=1).stderr


def test_a_trained_reader_reads_prompts(run: Run, tiny_pooled_dir: Path) -> None:
    _write_questions()
    how = ["--data", "qa.jsonl", "--steps", "2", "--batch-questions", "2", "--output", "trained"]
    trained = _json(run("train", "reader", *how, "--json"))
    assert trained["steps"] == 2
    assert "use it with `knowstore --reader trained`" in run("train", "reader", *how).stderr
    run("ingest", "facts.jsonl")
    assert _json(run("--reader", "trained", "ask", "Where is Lyon?", "--mode", "rag", "--json"))["mode"] == "rag"
    onward = [*how[:-1], "further"]
    assert _json(run("train", "reader", *onward, "--from", "trained", "--json"))["steps"] == 2
    assert "other settings or models" in run("train", "reader", *onward, status=1).stderr
    moved = json.loads(Path("trained/config.json").read_text("utf-8")) | {"layer": 0}
    ReaderHypernetwork(ReaderConfig(**{name: value for name, value in moved.items() if name != "kind"})).save(
        Path("moved")
    )
    refused = run("train", "reader", *onward, "--from", "moved", status=1)
    assert "moved reads beside experts at layer 0" in refused.stderr
    config = json.loads((tiny_pooled_dir / "config.json").read_text("utf-8"))
    for changed in ({"width": config["width"] + 8}, {"layer": 40}):
        other = PooledConfig(**{name: value for name, value in (config | changed).items() if name != "kind"})
        PooledHypernetwork(other).save(Path("other"))
        refused = run("train", "reader", *how, "--hypernetwork", "other", status=1)
        assert "other is a pooled hypernetwork for layer" in refused.stderr


def test_a_trained_reranker_weighs_sentences(run: Run) -> None:
    _write_questions()
    how = ["--data", "qa.jsonl", "--steps", "3", "--batch-size", "2", "--n-negatives", "2", "--seed", "1"]
    trained = _json(run("train", "reranker", *how, "--output", "trained", "--json"))
    assert set(trained) == {
        "output", "steps", "seconds", "loss", "sentence_accuracy", "gold_first", "null_threshold", "temperature",
        "size_bytes",
    }  # fmt: skip
    assert trained["steps"] == 3
    kept = json.loads(Path("trained/config.json").read_text("utf-8"))
    assert trained["temperature"] == kept["temperature"] != 1.0
    assert trained["null_threshold"] == pytest.approx(-3.6)  # the late one's, which orders passages, at its temperature
    again = _json(run("train", "reranker", *how, "--output", "trained", "--json"))
    assert again == trained
    assert {file.name for file in Path("trained").iterdir()} == {"model.safetensors", "config.json", "training"}
    models = {row["role"]: row for row in _json(run("models", "list", "--reranker", "trained", "--json"))["models"]}
    assert models["reranker"]["state"] == "ready"
    assert "on questions kept out" in models["reranker"]["notes"]
    further = _json(run("train", "reranker", *how, "--from", "trained", "--output", "further", "--json"))
    assert further["steps"] == 3
    assert json.loads(Path("further/config.json").read_text("utf-8"))["trained_steps"] == 6
    assert Path("further/model.safetensors").read_bytes() != Path("trained/model.safetensors").read_bytes()
    refused = run("train", "reranker", *how, "--from", "further", "--output", "further", status=1)
    assert "another start" in refused.stderr
    run("train", "reranker", *how, "--from", "trained", "--base", "trained", "--output", "other", status=2)
    refused = run("train", "reranker", *how, "--base", "trained", "--dropout", "0.1", "--output", "other", status=2)
    assert "--dropout" in refused.stderr
    deeper = ("--n-shared", "0", "--dropout", "0.1", "--output", "deeper", "--json")
    _json(run("train", "reranker", *how, "--from", "trained", *deeper))
    assert Path("deeper/model.safetensors").stat().st_size > Path("trained/model.safetensors").stat().st_size
    refused = run("train", "reranker", *how, "--from", "deeper", "--n-shared", "1", "--output", "other", status=1)
    assert "only the first 0 of this encoder are" in refused.stderr
    run("ingest", "facts.jsonl")
    late = _json(run("ask", "Where is Lyon?", "--explain", "--json", "--reranker", "late"))
    joint = _json(run("ask", "Where is Lyon?", "--explain", "--json", "--reranker", "trained"))
    assert [hit["score"] for hit in joint["hits"]] == [2 * hit["score"] for hit in late["hits"]]
    assert [hit["segment_scores"] for hit in joint["hits"]] != [hit["segment_scores"] for hit in late["hits"]]


def test_a_store_is_changed_over_to_another_hypernetwork_and_back(run: Run, tiny_pooled_dir: Path) -> None:
    run("ingest", "facts.jsonl")
    other = ("--hypernetwork", str(tiny_pooled_dir))
    run("ask", "Who?", *other, status=1)
    report = _json(run("reexpert", "--json", *other))
    assert (report["generated"], report["reused"]) == (3, 0)
    assert _json(run("verify", "--json"))["clean"] is True
    assert _json(run("reexpert", "--undo", "--json"))["reused"] == 3
    run("reexpert", "--undo", "--drop-previous", status=2)
    run("reexpert", "--dry-run", status=2)
    refused = run("reexpert", "--drop-previous", status=2)
    assert "What goes:\nname\tsize_bytes\thypernetwork\tllm\nexperts_" in refused.stderr
    going = _json(run("reexpert", "--drop-previous", "--dry-run", "--json"))
    assert (going["dropped"], going["dry_run"]) == (0, True)
    [bank] = going["banks"]
    assert bank["size_bytes"] > 0
    assert bank["hypernetwork"] == str(tiny_pooled_dir)
    assert run("reexpert", "--drop-previous", "--dry-run").stdout.startswith("Would delete 1 bank of other models (")
    assert _json(run("reexpert", "--drop-previous", "--yes", "--json"))["dropped"] == 1
    assert "nothing needs to be undone" in run("reexpert", "--undo", status=1).stderr
    assert run("reexpert", "--drop-previous").stdout == "There are no experts of other models\n"
    assert _json(run("reexpert", "--drop-previous", "--json"))["dropped"] == 0
