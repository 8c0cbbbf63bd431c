"""What audits make of histories that people have: sources ingested again, audits of a part, changed settings, removed
facts that are still told. Answers are given by the tests, everything else is real."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from knowstore import KnowledgeStore, Passage
from knowstore.audits import Selection, add_probes, live_probes, run_audit, write_report
from knowstore.catalog import AuditLog
from knowstore.config import ModelConfig, RetrievalConfig
from knowstore.errors import CatalogError
from knowstore.records import Answer, Probe, ProbeKind

Open = Callable[..., KnowledgeStore]
Write = Callable[[str, Sequence[Passage]], str]


def probe(
    question: str, answers: Sequence[str], passage: Passage | None = None, kind: ProbeKind = "reliability"
) -> tuple[str, Probe]:
    return "here", Probe(question, tuple(answers), kind, None if passage is None else passage.passage_id)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What every store answers, by question."""
    told: dict[str, str] = {}
    ask_many = KnowledgeStore.ask_many

    def ask(self: KnowledgeStore, questions: Sequence[str], **options: Any) -> list[Answer]:
        answers = ask_many(self, questions, **options)
        return [
            replace(one, text=told.get(question, one.text)) for one, question in zip(answers, questions, strict=True)
        ]

    monkeypatch.setattr(KnowledgeStore, "ask_many", ask)
    return told


def test_probes_of_a_source_that_is_ingested_again_are_facts_still(
    open_store: Open, write_facts: Write, says: dict[str, str]
) -> None:
    says["What is blue?"] = "the door"
    store = open_store()
    rows = [probe("What is blue?", ["door"])]
    first = store.ingest([write_facts("doors.jsonl", [Passage("The door is blue.", "Door")])])
    add_probes(store, rows, batch_id=first.batch_id)
    source = write_facts("doors.jsonl", [Passage("The old door is blue.", "Door")])
    second = store.ingest([source])

    report = add_probes(store, rows, batch_id=second.batch_id)

    assert (report.added, report.known) == (1, 0)
    found: Any = run_audit(store)
    assert (found["matrix"], found["batches"], found["residue"]["n"]) == ([[1.0, 1.0]], [1, 2], 0)
    assert add_probes(store, rows, batch_id=second.batch_id).known == 1


def test_an_untouched_answer_is_not_kept_for_a_probe_that_was_purged_meanwhile(
    open_store: Open, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    from knowstore.audits import run

    store, other = open_store(), open_store()
    secret = Passage("The vault opens with the word xylophone.", "Vault")
    store.add([*facts[:2], secret])
    add_probes(store, [probe("Is xylophone the word?", ["yes"], secret), probe("Who wrote Emma?", [], kind="locality")])
    store.remove([secret.passage_id])
    bare = run._bare_answers

    def purge_and_answer(*arguments: Any) -> list[str]:
        other.remove([secret.passage_id], purge=True)
        return bare(*arguments)

    monkeypatch.setattr(run, "_bare_answers", purge_and_answer)
    run_audit(store)
    for file in store.layout.folder.rglob("*"):
        assert not file.is_file() or b"xylophone" not in file.read_bytes(), file


def test_questions_that_differ_by_a_sign_contest_nothing(open_store: Open, says: dict[str, str]) -> None:
    c, plus = Passage("C is by Dennis Ritchie.", "C"), Passage("C++ is by Bjarne Stroustrup.", "C++")
    says |= {"Who made C?": "Dennis Ritchie", "Who made C++?": "Bjarne Stroustrup"}
    store = open_store()
    store.add([c])
    add_probes(store, [probe("Who made C?", ["Dennis Ritchie"], c)])
    store.add([plus])
    add_probes(store, [probe("Who made C++?", ["Bjarne Stroustrup"], plus)])
    found: Any = run_audit(store)
    assert (found["matrix"], found["contradictions"]["n"]) == ([[1.0, 1.0]], 0)
    later = Passage("C is by Brian Kernighan.", "C again")
    store.add([later])
    add_probes(store, [probe("who made  C", ["Brian Kernighan"], later)])
    contested: Any = run_audit(store)
    assert contested["contradictions"]["n"] == 1


def test_an_audit_of_a_part_leaves_removed_facts_out_and_the_others_in_the_report(
    open_store: Open, facts: list[Passage], says: dict[str, str], tmp_path: Path
) -> None:
    says |= {"One?": "right", "Two?": "right", "Three?": "wrong"}
    store = open_store()
    store.add(facts[:1])
    add_probes(store, [probe("One?", ["right"], facts[0])])
    run_audit(store)
    store.add(facts[1:3])
    add_probes(store, [probe("Two?", ["right"], facts[1]), probe("Three?", ["right"], facts[2])])
    run_audit(store)
    store.remove([facts[2].passage_id])

    found: Any = run_audit(store, selection=Selection(batches=(1,)))

    assert found["matrix"] == [[1.0, None], [1.0, 1.0], [1.0, None]]
    assert found["forward"] == 0.0
    report = json.loads(write_report(store, tmp_path / "report.html")[1].read_text("utf-8"))
    questions = {one["question"]: one for one in report["modes"][0]["questions"]}
    assert {question: one["now_after"] for question, one in questions.items()} == {"One?": 3, "Two?": 2, "Three?": 2}


def test_an_audit_that_asks_for_no_fact_has_no_average(
    open_store: Open, facts: list[Passage], says: dict[str, str]
) -> None:
    says["One?"] = "right"
    store = open_store()
    store.add(facts[:1])
    add_probes(store, [probe("One?", ["right"], facts[0])])
    assert run_audit(store)["average"] == 1.0
    store.add(facts[1:2])
    add_probes(store, [probe("Who wrote Emma?", [], kind="locality")])
    found: Any = run_audit(store, selection=Selection(batches=(2,)))
    assert (found["average"], found["average_ci"], found["locality"]["n"]) == (None, None, 1)


def test_an_audit_goes_on_only_with_the_settings_that_it_began_with(
    open_store: Open, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.add(facts)
    add_probes(store, [probe(f"When was Rome founded in {n}?", ["753 BC"], facts[0]) for n in range(18)])
    record = AuditLog.record

    def record_and_end(*arguments: Any) -> None:
        record(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "record", record_and_end)
        with pytest.raises(KeyboardInterrupt):
            run_audit(store)
    with pytest.raises(CatalogError, match="how it retrieves and answers"):
        run_audit(open_store(retrieval=RetrievalConfig(null_threshold=1e9)), resume=True)
    assert run_audit(store, resume=True)["n"] == 18


def test_two_audits_of_one_batch_are_compared_when_the_settings_changed(
    open_store: Open, facts: list[Passage], says: dict[str, str], tmp_path: Path
) -> None:
    questions = [f"Question {n}?" for n in range(4)]
    says |= dict.fromkeys(questions, "right")
    store = open_store()
    store.add(facts[:2])
    add_probes(store, [probe(question, ["right"], facts[0]) for question in questions])
    run_audit(store)
    says |= dict.fromkeys(questions, "wrong")
    changed = open_store(retrieval=RetrievalConfig(top_k=1, null_threshold=1e9))
    run_audit(changed)
    page, data, _, text = (file.read_text("utf-8") for file in write_report(changed, tmp_path / "report.html"))
    [mode] = json.loads(data)["modes"]
    assert (mode["changed"]["n"], mode["changed"]["lost"], mode["answered_otherwise"]) == (4, 4, [1])
    assert "Models or settings were others" in page
    assert "Models or settings were others" in text


def test_other_samples_are_said_to_be_other_questions(
    open_store: Open, facts: list[Passage], says: dict[str, str], tmp_path: Path
) -> None:
    says |= {f"Question {n}?": "right" if n % 2 else "wrong" for n in range(8)}
    store = open_store()
    store.add(facts[:2])
    add_probes(store, [probe(question, ["right"], facts[0]) for question in says])
    probes = store.catalog.audits.probes()
    chosen = {Selection(sample=1, seed=seed).choose(probes)[0].id: seed for seed in range(50)}
    assert len(chosen) == 8
    run_audit(store, selection=Selection(sample=1, seed=chosen[probes[0].id]))
    store.add(facts[2:3])
    same: Any = run_audit(store, selection=Selection(sample=1, seed=chosen[probes[0].id]))
    assert (same["uneven"], same["matrix_n"]) == (False, [[1], [1]])
    store.add(facts[3:4])
    found: Any = run_audit(store, selection=Selection(sample=1, seed=chosen[probes[1].id]))
    assert (found["uneven"], found["matrix_n"], found["same_probes"]["em"]["n"]) == (True, [[1], [1], [1]], 0)
    files = write_report(store, tmp_path / "report.html")
    for file in (files[0], files[3]):
        assert "asked other probes" in file.read_text("utf-8")


def test_a_removed_fact_in_a_sentence_leaks_too_and_is_shown_first(
    open_store: Open, facts: list[Passage], says: dict[str, str], tmp_path: Path
) -> None:
    says |= {f"When was Rome founded in {n}?": "It was in 753 BC" if n == 3 else "no" for n in range(5)}
    store = open_store(retrieval=RetrievalConfig(null_threshold=1e9))
    store.add(facts[:3])
    add_probes(store, [probe(question, ["753 BC"], facts[0]) for question in says])
    store.remove([facts[0].passage_id])
    found: Any = run_audit(store)
    residue = found["residue"]
    assert (residue["n"], residue["answered"], residue["exactly"], residue["leaked"]) == (5, 1, 0, 1)
    page = write_report(store, tmp_path / "report.html", n_questions=1)[0].read_text("utf-8")
    assert "It was in 753 BC" in page


def test_a_lost_probe_is_named_and_ends_no_report(open_store: Open, facts: list[Passage], tmp_path: Path) -> None:
    store = open_store()
    store.add(facts[:2])
    add_probes(store, [probe("One?", ["right"], facts[0]), probe("Two?", ["right"], facts[1])])
    run_audit(store)
    with closing(sqlite3.connect(store.layout.catalog_path)) as connection, connection:
        connection.execute("DELETE FROM probes WHERE id = 1")
    assert not store.verify().clean
    report = json.loads(write_report(store, tmp_path / "report.html")[1].read_text("utf-8"))
    assert [one["question"] for one in report["modes"][0]["questions"]] == ["Two?"]


def test_probes_that_travel_are_those_that_hold(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    newer = Passage("Rome was founded in 1200 AD.", "Rome")
    store.add(facts[:1])
    add_probes(store, [probe("When was Rome founded?", ["753 BC"], facts[0])])
    store.add([facts[1]])
    add_probes(store, [probe("What was brought?", ["a king"])])
    store.remove([facts[1].passage_id])
    store.add([newer])
    add_probes(store, [probe("When was Rome founded?", ["1200 AD"], newer), probe("Who?", [], kind="locality")])
    assert [(one.question, one.answers) for one in live_probes(store)] == [
        ("When was Rome founded?", ("1200 AD",)), ("Who?", ()),
    ]  # fmt: skip


def test_questions_about_no_fact_are_kept_once_however_often_their_source_changes(
    open_store: Open, write_facts: Callable[..., Path]
) -> None:
    store = open_store()
    rows = [
        ("here", Probe("Who wrote Emma?", (), "locality")),
        ("here", Probe("What is secret?", ("xyzzy",), "removed")),
        ("here", Probe("What is blue?", ("the door",), "reliability")),
    ]
    for number in range(3):
        batch = store.ingest([write_facts("doors.jsonl", [Passage(f"Door {number} is blue.", "Door")])])
        add_probes(store, rows, batch_id=batch.batch_id)
    found: Any = run_audit(store)
    assert (found["locality"]["n"], found["residue"]["n"]) == (1, 1)


def test_a_fact_is_retrieved_by_the_passage_that_tells_it_now(
    open_store: Open, write_facts: Callable[..., Path]
) -> None:
    store = open_store()
    for number in range(3):
        batch = store.ingest([write_facts("doors.jsonl", [Passage(f"The door is blue. Version {number}.", "Door")])])
        [live] = store.passages()
        add_probes(store, [("here", Probe("What is blue?", ("door",), "reliability", live.passage_id))])
        found: Any = run_audit(store)
        assert batch.batch_id == number + 1
        assert found["kinds"]["reliability"]["retrieved"] == 1.0
    assert found["kinds"]["reliability"]["n"] == 3


def test_a_report_tells_what_became_of_questions_that_the_last_audit_left_out(
    open_store: Open, facts: list[Passage], says: dict[str, str], tmp_path: Path
) -> None:
    says |= {"One?": "right", "Two?": "right", "Three?": "right"}
    store = open_store()
    store.add(facts[:2])
    add_probes(store, [("", Probe(q, ("right",), "reliability", one.passage_id))
                       for q, one in zip(("One?", "Two?"), facts, strict=False)])  # fmt: skip
    run_audit(store)
    store.remove([facts[1].passage_id])
    store.add(facts[2:3])
    add_probes(store, [("", Probe("Three?", ("right",), "reliability", facts[2].passage_id))])
    run_audit(store, selection=Selection(since=3))
    html, as_json, *_ = write_report(store, tmp_path / "report.html")
    [mode] = json.loads(as_json.read_text("utf-8"))["modes"]
    states = {one["question"]: (one["state"], one["now_state"], one["now_after"]) for one in mode["questions"]}
    assert states == {
        "One?": ("current", "current", 1), "Two?": ("gone", "current", 1), "Three?": ("current", "current", 3),
    }  # fmt: skip
    page = html.read_text("utf-8")
    assert "<b>Batch 1</b><span>1 current</span>" in page
    assert page.count("asked last after batch 1") == 2


def test_a_removed_fact_that_is_told_is_called_so_though_a_live_passage_explains_it(
    open_store: Open, says: dict[str, str], tmp_path: Path
) -> None:
    store = open_store()
    one, other = Passage("The code of the door is 4711.", "Door"), Passage("4711 opens the door.", "Door")
    store.add([one, other])
    says["What is the code?"] = "4711"
    add_probes(store, [("", Probe("What is the code?", ("4711",), "reliability", one.passage_id))])
    store.remove([one.passage_id])
    found: Any = run_audit(store)
    assert (found["residue"]["still"], found["residue"]["rate"]) == (1.0, 0.0)
    markdown = write_report(store, tmp_path / "report.html")[3].read_text("utf-8")
    assert "| removed facts still told | 100.0 % |" in markdown
    assert "| of which nothing explains | 0.0 % |" in markdown


def test_another_precision_is_said_and_ends_no_audit_that_began_in_the_first(
    open_store: Open, facts: list[Passage], tiny_models: ModelConfig, tmp_path: Path
) -> None:
    store = open_store()
    store.add(facts[:3])
    add_probes(store, [("", Probe(f"What is {n}?", ("right",), "reliability", facts[0].passage_id)) for n in range(40)])
    run_audit(store)

    def cut(_what: str, done: int, _n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_audit(store, on_progress=cut)
    other = open_store(models=replace(tiny_models, dtype="bfloat16"))
    with pytest.raises(CatalogError, match="precision or device"):
        run_audit(other, resume=True)
    run_audit(other)
    [mode] = json.loads(write_report(other, tmp_path / "report.html")[1].read_text("utf-8"))["modes"]
    assert mode["answered_otherwise"] == [1]
