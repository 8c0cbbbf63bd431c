"""Audits of a growing store: figures are those of the answers, killed ones go on, purged facts are in no file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from knowstore import KnowledgeStore, Passage
from knowstore.audits import Selection, add_probes, make_probes, read_probes, run_audit
from knowstore.audits.results import summarise
from knowstore.catalog import AuditLog
from knowstore.config import RetrievalConfig
from knowstore.errors import CatalogError, ConfigError, PassageError
from knowstore.evaluation import normalise
from knowstore.records import Asked, Probe, ProbeAnswer, ProbeKind

Open = Callable[..., KnowledgeStore]
FIGURES = {
    "matrix", "matrix_f1", "batches", "average", "average_ci", "bwt", "bwt_f1", "forward", "locality", "contradictions",
    "residue", "audit_id", "n", "seconds",
}  # fmt: skip


def probe(
    question: str, answers: Sequence[str], passage: Passage | None = None, kind: ProbeKind = "reliability"
) -> tuple[str, Probe]:
    return "here", Probe(question, tuple(answers), kind, None if passage is None else passage.passage_id)


def asked_by(store: KnowledgeStore, *rows: tuple[str, Probe]) -> None:
    report = add_probes(store, rows)
    assert (report.added, report.failures) == (len(rows), ())


def stored(store: KnowledgeStore, audit_id: int = 1) -> dict[int, Any]:
    return {one.probe_id: one for one in store.catalog.audits.answers(audit_id)}


def test_a_matrix_grows_by_a_row_with_every_audit(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    store.add(facts[:2])
    right = store.ask("When was Rome founded?").text
    assert right
    asked_by(store, probe("When was Rome founded?", [right], facts[0]), probe("Who?", ["no such answer"], facts[1]))
    first: Any = run_audit(store)
    assert set(first) >= FIGURES
    assert (first["matrix"], first["batches"], first["average"], first["bwt"]) == ([[0.5]], [1], 0.5, None)

    store.add(facts[2:4])
    now = {question: store.ask(question).text for question in ("When was Rome founded?", "Where is Lyon?")}
    asked_by(store, probe("Where is Lyon?", [now["Where is Lyon?"]], facts[2]))
    second: Any = run_audit(store)
    kept = float(now["When was Rome founded?"] == right) / 2
    assert second["matrix"] == [[0.5, None], [kept, 1.0]]
    assert (second["batches"], second["audited"], second["matrix_n"]) == ([1, 2], [1, 2], [[2, 0], [2, 1]])
    assert second["bwt"] == kept - 0.5
    assert second["average"] == (kept + 1) / 2
    assert second["forward"] == 0.5
    assert second["same_probes"]["em"]["n"] == 2
    assert second["same_probes"]["em"]["lost"] == (kept == 0)
    answer, asked = stored(store, 2)[1], store.ask("When was Rome founded?")
    assert answer.text == asked.text
    assert answer.experts == tuple((one.passage_id, one.weight, one.batch_id) for one in asked.experts)
    assert answer.rank == 1 + [hit.passage_id for hit in asked.hits].index(facts[0].passage_id)


def test_removed_contested_and_unrelated_probes_are_told_apart(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    store.add(facts[:3])
    newer = Passage("Rome was founded in 1200 AD. It lies on the river Po.", "Rome")
    questions = ("When was Rome founded?", "Who was the first king?", "Where does Lyon lie?")
    asked_by(store, *(probe(q, [f"{n} of the old"], facts[n]) for n, q in enumerate(questions)))
    asked_by(store, probe("Who wrote Faust?", [], kind="locality"))
    store.add([newer])
    store.remove([facts[1].passage_id])
    told = store.ask(questions[0]).text
    asked_by(store, probe(questions[0], [told], newer))
    asked_by(store, probe("Who wrote Emma?", [store.ask("Who wrote Emma?").text], kind="removed"))
    found: Any = run_audit(store)
    assert [stored(store)[n].state for n in range(1, 7)] == [
        "contested", "gone", "current", "current", "current", "gone"
    ]  # fmt: skip
    assert found["matrix"] == [[0.0, float(store.ask(questions[0]).text == told)]]
    contested = found["contradictions"]["both_retrieved"]
    assert (contested["n"], contested["newer"], contested["rate"]) == (1, 1, 1.0)
    residue = found["residue"]
    assert (residue["n"], residue["answered"], residue["retrieved"]) == (2, 1, 0)
    assert residue["leaked"] + residue["known"] + residue["told"] == 1
    bare = open_store(retrieval=RetrievalConfig(null_threshold=1e9)).ask("Who wrote Faust?")
    assert bare.is_null
    same = normalise(bare.text) == normalise(stored(store)[4].text)
    assert (found["locality"]["n"], found["locality"]["same"]) == (1, float(same))


def test_an_audit_sees_the_store_as_it_was_when_it_began(
    open_store: Open, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.add(facts[:2])
    asked_by(store, *(probe(f"When was Rome founded in {n}?", ["x"], facts[0]) for n in range(17)))
    writer = open_store()
    ask_many, batches = store.ask_many, []

    def ask_and_write(*arguments: Any, **options: Any) -> Any:
        answers = ask_many(*arguments, **options)
        if not batches:
            batches.append(writer.remove([facts[0].passage_id]).batch_id)
        return answers

    monkeypatch.setattr(store, "ask_many", ask_and_write)
    found: Any = run_audit(store)
    assert found["batch_id"] == 1
    assert {one.rank is None for one in stored(store).values()} == {False}
    assert {one.state for one in stored(store).values()} == {"current"}
    monkeypatch.undo()
    run_audit(store)
    assert {(one.rank, one.state) for one in stored(store, 2).values()} == {(None, "gone")}


def test_an_audit_that_was_cut_short_goes_on_where_it_was(
    open_store: Open, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.add(facts)
    asked_by(store, *(probe(f"When was Rome founded in {n}?", ["753 BC"], facts[0]) for n in range(18)))
    with pytest.raises(ConfigError, match="no audit was cut short"):
        run_audit(store, resume=True)
    record = AuditLog.record

    def record_and_die(*arguments: Any) -> None:
        record(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(AuditLog, "record", record_and_die)
    with pytest.raises(KeyboardInterrupt):
        run_audit(store)
    monkeypatch.undo()
    again, log = open_store(), store.catalog.audits
    assert (len(log.answers(1)), log.audits()) == (16, [])
    texts = {probe_id: one.text for probe_id, one in stored(store).items()}
    found: Any = run_audit(again, resume=True)
    assert (found["audit_id"], found["n"], len(log.unanswered(1))) == (1, 18, 0)
    assert {probe_id: one.text for probe_id, one in stored(store).items() if probe_id in texts} == texts
    whole: Any = run_audit(store)
    for name in ("matrix", "matrix_f1", "average", "average_ci", "residue", "locality"):
        assert whole[name] == found[name]


def test_an_audit_of_a_store_that_was_changed_since_is_not_resumed(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    store.add(facts[:1])
    asked_by(store, probe("When?", ["x"], facts[0]))
    store.catalog.audits.begin(1, "experts", {"models": {}}, [])
    with pytest.raises(CatalogError, match="its models were changed since"):
        run_audit(store, resume=True)
    store.add(facts[1:2])
    with pytest.raises(CatalogError, match="changed since"):
        run_audit(store, resume=True)


def test_modes_and_parts_are_audited_by_themselves(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    store.add(facts[:1])
    store.add(facts[1:2])
    asked_by(store, *(probe(f"Where {n}?", ["x"], facts[0]) for n in range(3)), probe("Who?", ["y"], facts[1]))
    part: Any = run_audit(store, selection=Selection(since=2), mode="hybrid")
    assert (part["n"], part["batches"]) == (1, [2])
    sampled: Any = run_audit(store, selection=Selection(sample=2))
    assert (sampled["n"], sampled["matrix_n"]) == (3, [[2, 1]])
    rest: Any = run_audit(store, selection=Selection(batches=(1,)), mode="hybrid")
    assert rest["matrix_n"] == [[3, 1]]
    with pytest.raises(ConfigError, match="batches that were named"):
        run_audit(store, selection=Selection(since=9))


def test_probes_belong_to_the_batch_of_their_passage(open_store: Open, facts: list[Passage], tmp_path: Path) -> None:
    store = open_store()
    with pytest.raises(CatalogError, match="holds nothing"):
        add_probes(store, [probe("Who?", ["x"])])
    for passage in facts[:3]:
        store.add([passage])
    store.remove([facts[0].passage_id])
    rows = [{"question": f"Q{n}?", "answers": ["x"], "kind": "reliability"} for n in range(4)]
    for row, passage_id in zip(rows, (facts[1].passage_id, None, facts[0].passage_id, "e" * 32), strict=True):
        row["passage_id"] = passage_id  # type: ignore[assignment]
    file = tmp_path / "probes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    report = add_probes(store, read_probes(file).rows)
    assert [one.batch_id for one in store.catalog.audits.probes()] == [2, 4, 4]
    [failure] = report.failures
    assert (failure.source, "was never in it" in failure.error) == (f"{file}:4", True)
    again = add_probes(store, read_probes(file).rows)
    assert (again.added, again.known, len(again.failures)) == (0, 3, 1)


def test_probes_and_answers_of_a_purged_passage_are_in_no_file(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    secret = Passage("The vault opens with the word xylophone.", "Vault", "here")
    store.add([*facts, secret])
    rows = [probe(f"What opens vault {n}?", [f"xylophone-{n}"], secret) for n in range(300)]
    asked_by(store, *rows, probe("Where does Lyon lie?", ["x"], facts[2]))
    with sqlite3.connect(store.layout.catalog_path) as peek:
        assert peek.execute("SELECT count(*) FROM probes").fetchone() == (301,)
    peek.close()
    run_audit(store, selection=Selection(sample=1))
    store.remove([secret.passage_id], purge=True)
    for file in store.layout.folder.rglob("*"):
        assert not file.is_file() or b"xylophone" not in file.read_bytes(), file
    assert [one.question for one in store.catalog.audits.probes()] == ["Where does Lyon lie?"]
    assert add_probes(store, rows[:1]).failures[0].error.endswith("it was purged from it")


def test_a_purge_leaves_the_figures_of_what_it_did_not_delete(open_store: Open, facts: list[Passage]) -> None:
    store = open_store(retrieval=RetrievalConfig(null_threshold=None, top_k=6))
    store.add(facts)
    asked_by(store, probe("Where does Lyon lie?", ["x"], facts[2]), probe("Who wrote Faust?", [], kind="locality"))
    before: Any = run_audit(store)
    assert before["locality"]["n"] == 1
    store.remove([facts[0].passage_id], purge=True)  # was mounted for every answer
    assert {one.text for one in stored(store).values()} == {None}
    after = summarise(store, "experts")
    assert after["matrix"] == before["matrix"]
    assert cast(dict[str, Any], after["locality"])["n"] == 0


def test_what_was_purged_during_an_audit_is_not_written_back(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    store.add(facts)
    asked_by(store, probe("Where does Lyon lie?", ["x"], facts[2]))
    audit = store.catalog.audits.begin(1, "experts", {}, [Asked(1, "current")])
    store.remove([facts[0].passage_id], purge=True)
    late = ProbeAnswer(1, "753 BC", 0.0, 0.5, 1, None, False, ((facts[0].passage_id, 1.0, 1),))
    store.catalog.audits.record(audit.id, [late], 0.1)
    [kept] = store.catalog.audits.answers(audit.id)
    assert (kept.text, kept.f1) == (None, 0.5)


def test_probes_are_made_of_passages_that_hold_their_answers(
    open_store: Open, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.add(facts[:4])
    said = {
        "Rome": ("When was the city of Rome founded?", "753 BC."), "Romulus": ("A king.", "Romulus"),
        "Lyon": ("Where does the Rhône lie?", "on the Po"), "Rhône": ("Does the river end in the sea?", "the sea"),
    }  # fmt: skip

    def write(store: KnowledgeStore, prompts: Sequence[tuple[str, str]]) -> list[str]:
        titles = [before.rsplit("Text: ", 1)[1].split(".")[0] for before, _ in prompts]
        return [said[title]["Question: " in question] for title, (_, question) in zip(titles, prompts, strict=True)]

    monkeypatch.setattr("knowstore.audits.making._written", write)
    made = make_probes(store)
    assert [(one.question, one.answers, one.passage_id) for one in made.probes] == [
        (said["Rome"][0], ("753 BC",), facts[0].passage_id)
    ]
    assert (made.tried, made.refused) == (
        4, {"is no question": 1, "has an answer that is not in the passage": 1, "tells its answer": 1},
    )  # fmt: skip
    monkeypatch.undo()
    assert make_probes(store, limit=2).tried == 2
    with pytest.raises(PassageError, match="in edit batch 7"):
        make_probes(store, batch_id=7)
