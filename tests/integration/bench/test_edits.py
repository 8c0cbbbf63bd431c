"""A long life of edits on tiny models: the sequence is what its shares say, and a run that was cut short goes on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from knowstore import KnowledgeStore
from knowstore.audits import Selection, run_audit
from knowstore.bench import EditsConfig, read_unrelated, run_edits
from knowstore.bench.edits import Fact, make_steps, read_facts, with_filling
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError
from knowstore.evaluation import holds_answer
from knowstore.records import Passage, Probe

CONFIG = EditsConfig(n_batches=4, n_passages=10, updates=0.2, removals=0.1, contradictions=0.1, n_questions=2, seed=5)


def facts(n: int) -> list[Fact]:
    return [
        Fact(
            Passage(f"Town {number} has {number + 100} houses and lies at river {number * 7} Aa.", f"Town {number}"),
            ((f"How many houses has town {number}?", (f"{number + 100} houses",)), (f"Where is {number}?", ("Town",))),
        )
        for number in range(n)
    ]


def test_batches_hold_the_shares_that_were_asked_for() -> None:
    everything: dict[str, list[Passage]] = {}
    for number, step in enumerate(make_steps(facts(40), CONFIG), 1):
        before = [passage.passage_id for some in everything.values() for passage in some]
        everything |= step.sources
        after = [passage.passage_id for some in everything.values() for passage in some]
        added, gone = Counter(after) - Counter(before), Counter(before) - Counter(after)
        assert (sum(added.values()), sum(gone.values())) == ((10, 0) if number == 1 else (10, 3))
        assert {probe.passage_id for probe in step.probes} == set(added)
        assert len(step.sources[f"batch-{number:03}.jsonl"]) == (10 if number == 1 else 8)
        texts = {passage.passage_id: passage.text for some in everything.values() for passage in some}
        for probe in step.probes:
            assert probe.answers[0] in texts[probe.passage_id or ""]
    questions = Counter(probe.question for step in make_steps(facts(40), CONFIG) for probe in step.probes)
    assert max(questions.values()) > 1


def test_an_answer_is_exchanged_for_one_to_a_like_question() -> None:
    births = [
        Fact(
            Passage(f"Ann {letter}. was born in {letter}ville.", letter),
            ((f"Where was Ann {letter} born?", (f"{letter}ville",)),),
        )
        for letter in "ABCDEFGHIJKLMNOPQRST"
    ]
    trades = [
        Fact(
            Passage(f"Bob {letter}. is a {letter}smith.", letter),
            ((f"What is the trade of Bob {letter}?", (f"{letter}smith",)),),
        )
        for letter in "ABCDEFGHIJKLMNOPQRST"
    ]
    config = EditsConfig(n_batches=3, n_passages=12, updates=0.3, removals=0.0, contradictions=0.3)
    for step in make_steps([*births, *trades], config):
        for probe in step.probes:
            assert probe.answers[0].endswith("ville" if probe.question.startswith("Where") else "smith")


def test_what_takes_a_facts_place_tells_nothing_of_it() -> None:
    def fact(number: int, text: str, *answers: str, title: str = "") -> Fact:
        return Fact(Passage(text, title or f"Song {number}"), ((f"What is song {number}?", answers),))

    plain = [fact(number, f"It is a tune{number}. Not tune{number}smith.", f"tune{number}") for number in range(20)]
    told = [
        fact(number, f"It is a hymn{number}, or psalm{number}.", f"hymn{number}", f"psalm{number}")
        if number % 2
        else fact(number, f"It is a hymn{number}.", f"hymn{number}", title=f"The hymn{number}")
        for number in range(20, 40)
    ]
    config = EditsConfig(n_batches=3, n_passages=12, updates=0.3, removals=0.0, contradictions=0.3)
    answers = {one.questions[0][0]: one.questions[0][1] for one in (*plain, *told)}
    n_changed = 0
    for step in make_steps([*plain, *told], config):
        texts = {one.passage_id: f"{one.title}. {one.text}" for some in step.sources.values() for one in some}
        for probe in step.probes:
            old = answers[probe.question]
            if probe.answers[0] != old[0]:
                n_changed += 1
                assert not holds_answer(texts[probe.passage_id or ""], old)
                assert f"{old[0]}smith" in texts[probe.passage_id or ""]
    assert n_changed > 8


def test_a_corpus_fills_what_questions_lack(tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    rows = [{"title": fact.passage.title, "text": fact.passage.text} for fact in facts(90)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [{"id": 1}, *rows]), "utf-8")
    filled, reserve = with_filling(facts(20), [file], CONFIG)
    assert len(filled) == CONFIG.n_fresh == 31
    assert [len(fact.questions) for fact in filled] == [2] * 20 + [0] * 11
    steps = list(make_steps(filled, CONFIG))
    assert sum(len(step.sources[f"batch-{number:03}.jsonl"]) for number, step in enumerate(steps, 1)) == 34
    assert len(filled) + len(reserve) == CONFIG.n_batches * CONFIG.n_passages
    assert with_filling(facts(40), [file], CONFIG)[0] == facts(40)


def test_passages_of_a_corpus_stand_in_for_edits_that_cannot_be_made(tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    rows = [{"title": fact.passage.title, "text": fact.passage.text} for fact in facts(90)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    filled, reserve = with_filling(facts(2), [file], CONFIG)
    with pytest.raises(ConfigError, match=f"the files hold {len(filled)} passages, too few"):
        list(make_steps(filled, CONFIG))
    steps = list(make_steps(filled, CONFIG, reserve))
    assert len(steps) == CONFIG.n_batches
    first = [one for step in steps[:1] for some in step.sources.values() for one in some]
    assert {one.passage_id for one in first} <= {fact.passage.passage_id for fact in filled}  # the reserve comes last


def test_the_same_seed_makes_the_same_sequence_and_too_few_passages_are_refused() -> None:
    assert list(make_steps(facts(40), CONFIG)) == list(make_steps(facts(40), CONFIG))
    assert list(make_steps(facts(40), CONFIG)) != list(make_steps(facts(40), replace(CONFIG, seed=6)))
    with pytest.raises(ConfigError, match="the files hold 20 passages"):
        list(make_steps(facts(20), CONFIG))
    with pytest.raises(ConfigError, match="cannot be made"):
        EditsConfig(updates=0.7, contradictions=0.5)


def test_questions_that_no_batch_is_about_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "unrelated.jsonl"
    rows: list[object] = [{"question": "Who?"}, {"question": "Who?", "answers": "me"}, {"answers": ["me"]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with pytest.raises(ConfigError, match=r"unrelated\.jsonl has no questions"):
        read_unrelated(file, 2)
    file.write_text("".join(json.dumps({"prompt": f"Who {n}?", "answers": ["me"]}) + "\n" for n in range(3)), "utf-8")
    assert read_unrelated(file, 2) == [Probe(f"Who {n}?", ("me",), "locality") for n in range(2)]


def test_a_run_that_was_cut_short_goes_on_and_ends_as_one_that_was_not(
    tiny_models: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "qa.jsonl"
    rows = [
        {
            "question": question,
            "answers": list(answers),
            "passage": {"title": one.passage.title, "text": one.passage.text},
        }
        for one in facts(20)
        for question, answers in one.questions
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in [{"question": "?"}, *rows]), "utf-8")
    assert len(read_facts([file], 1)) == 20
    config = EditsConfig(3, 6, 0.2, 0.2, 0.2, audit_every=2, sample=2)
    how: dict[str, Any] = {"config": config, "models": tiny_models, "unrelated": [Probe("Who?", ("me",), "locality")]}
    whole: Any = run_edits([file], tmp_path / "whole", **how)
    assert [audit["n"] for audit in whole["audits"]] == [5, 19]
    assert len(whole["matrix"]) == 2
    assert len(whole["batches"]) == 3
    assert whole["locality"]["n"] == 1
    assert (whole["residue"]["n"] > 0, whole["contradictions"]["n"] > 0) == (True, True)
    assert {path.name for path in (tmp_path / "whole").iterdir()} >= {"edits.json", "report.html", "report.csv"}

    import knowstore.bench.edits as edits

    ingest = edits._ingest
    monkeypatch.setattr(edits, "_ingest", lambda *arguments: ingest(*arguments) and 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run_edits([file], tmp_path / "cut", **how)
    monkeypatch.undo()
    again: Any = run_edits([file], tmp_path / "cut", **how)
    for other, match in (
        (how | {"config": replace(config, sample=3)}, "sample is 2, not 3\n"),
        (how | {"models": replace(tiny_models, reranker="other")}, "reranker is late, not other\n"),
        (how | {"unrelated": ()}, "its files held something else"),
    ):
        with pytest.raises(ConfigError, match=match):
            run_edits([file], tmp_path / "cut", **other)
    for name in ("matrix", "matrix_f1", "batches", "average", "residue", "contradictions", "passages"):
        assert again[name] == whole[name]


def test_audits_of_somebody_else_are_not_taken_for_those_of_a_run(tiny_models: ModelConfig, tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    rows = [
        {"question": q, "answers": list(a), "passage": {"title": one.passage.title, "text": one.passage.text}}
        for one in facts(12)
        for q, a in one.questions
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = EditsConfig(2, 6, 0.0, 0.0, 0.0, audit_every=0, sample=2)

    def cut(_what: str, done: int, _n: int) -> None:
        if _what == "asking" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_edits([file], tmp_path / "run", config=config, models=tiny_models, on_progress=cut)
    with KnowledgeStore.open(tmp_path / "run" / "store", models=tiny_models) as store:
        run_audit(store, selection=Selection(sample=1))
        with pytest.raises(KeyboardInterrupt):
            run_audit(store, mode="rag", on_progress=cut)
    found: Any = run_edits([file], tmp_path / "run", config=config, models=tiny_models)
    assert (found["audits"][-1]["n"], found["mode"], found["matrix_n"][-1]) == (12, "experts", [6, 6])
