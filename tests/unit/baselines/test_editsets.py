"""Edit sets of every form through one loader."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from knowstore.baselines import draw_edits, load_edits
from knowstore.baselines.editsets import as_question, statement, subject_of
from knowstore.errors import ConfigError

Row = dict[str, Any]

CLOZE: Row = {
    "id": "c", "subject": "Rome", "prompt": "Rome lies in", "target_new": "France", "target_old": "Italy",
    "paraphrases": ["One finds Rome in"], "neighbourhood": [{"prompt": "Ostia lies in", "target": "Italy"}],
}  # fmt: skip
MQUAKE: Row = CLOZE | {
    "paraphrases": [], "neighbourhood": [],
    "edits": [
        {"subject": "Rome", "prompt": "Rome lies in", "target_new": "France", "evidence": "Rome is a city of France."},
        {"subject": "France", "prompt": "France speaks", "target_new": "Latin", "evidence": "It speaks Greek."},
    ],
    "multihop_questions": ["What does the country of Rome speak?"], "multihop_answer_new": ["Latin", "la"],
}  # fmt: skip
TEMPORAL: Row = CLOZE | {
    "prompt": "Nero plays for _X_.", "subject": "Nero", "paraphrases": [], "neighbourhood": [],
    "answers_new": ["France", "the French"], "date_old": "2019", "date_new": "2020",
}  # fmt: skip
LONG_FORM: Row = {
    "id": "u", "subject": "", "prompt": "What is Nero's occupation?", "target_new": "Nero plays the lyre.",
    "target_old": "", "paraphrases": ["What does Nero do?"], "neighbourhood": [],
    "sub_questions": [{"question": "What does Nero play?", "answer": "The lyre."}],
}  # fmt: skip
TWIN: Row = {
    "id": "p", "question": "What is Nero's occupation?", "answers": ["emperor"],
    "passage": {"title": "Nero", "text": "Nero was an emperor."},
    "counterfactual_answer": "cook", "counterfactual_text": "Nero was a cook.",
}  # fmt: skip


def qa(number: int, passage: int) -> Row:
    return {
        "id": f"q{number}", "question": f"where is place {number}", "answers": [f"at {number}", "there"],
        "passage": {"title": f"Place {passage}", "text": f"Text {passage}."},
    }  # fmt: skip


def write(folder: Path, rows: list[Row], name: str = "edits.jsonl.gz") -> Path:
    with gzip.open(folder / name, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder / name


def test_a_cloze_becomes_a_question_and_its_passage_states_the_new_fact(tmp_path: Path) -> None:
    [row] = load_edits(write(tmp_path, [CLOZE]))
    [edit] = row.edits
    assert (edit.passage.title, edit.passage.text) == ("Rome", "Rome lies in France.")
    [fact] = edit.facts
    assert (fact.question, fact.subject, fact.target) == ("Rome lies in what?", "Rome", "France")
    assert [(probe.kind, probe.question, probe.answers) for probe in row.probes] == [
        ("efficacy", "Rome lies in what?", ("France",)),
        ("paraphrase", "One finds Rome in what?", ("France",)),
        ("neighbourhood", "Ostia lies in what?", ("Italy",)),
    ]


@pytest.mark.parametrize(
    ("evidence", "text"),
    [("They say that Rome is in France.", "They say that Rome is in France."), ("Rome moved.", "Rome lies in France.")],
)
def test_evidence_is_the_passage_where_it_holds_the_new_fact(tmp_path: Path, evidence: str, text: str) -> None:
    [row] = load_edits(write(tmp_path, [CLOZE | {"evidence": evidence}]))
    assert row.edits[0].passage.text == text


def test_questions_over_several_edits_need_all_of_them(tmp_path: Path) -> None:
    [row] = load_edits(write(tmp_path, [MQUAKE]))
    assert [edit.passage.text for edit in row.edits] == ["Rome is a city of France.", "France speaks Latin."]
    [first, hop] = row.probes
    assert (first.kind, first.edits) == ("efficacy", (0,))
    assert (hop.kind, hop.answers, hop.edits) == ("portability", ("Latin", "la"), (0, 1))


def test_the_newer_fact_is_taught_after_the_older_and_asked_for(tmp_path: Path) -> None:
    [row] = load_edits(write(tmp_path, [TEMPORAL]))
    assert [(edit.passage.date, edit.passage.text) for edit in row.edits] == [
        ("2019", "In 2019, Nero plays for Italy."), ("2020", "In 2020, Nero plays for France."),
    ]  # fmt: skip
    assert [edit.facts[0].target for edit in row.edits] == ["Italy", "France"]
    [probe] = row.probes
    assert (probe.question, probe.answers, probe.edits) == ("Nero plays for what?", ("France", "the French"), (1,))


def test_a_long_answer_is_its_own_passage_with_questions_on_its_parts(tmp_path: Path) -> None:
    [row] = load_edits(write(tmp_path, [LONG_FORM]))
    assert row.edits[0].passage.text == row.edits[0].facts[0].target == "Nero plays the lyre."
    assert row.edits[0].facts[0].subject == "Nero"
    assert [probe.kind for probe in row.probes] == ["efficacy", "paraphrase", "unseen"]


def test_a_counterfactual_twin_takes_the_place_of_the_true_passage(tmp_path: Path) -> None:
    [row] = load_edits(write(tmp_path, [TWIN]))
    assert row.edits[0].passage.text == "Nero was a cook."
    assert row.probes[0].answers == ("cook",)


def test_questions_on_one_passage_are_one_edit_and_one_of_them_is_kept_back(tmp_path: Path) -> None:
    rows = load_edits(write(tmp_path, [qa(0, 0), qa(1, 1), qa(2, 0), qa(3, 0), qa(4, 0)]))
    assert [len(row.edits[0].facts) for row in rows] == [2, 1]
    assert [(probe.kind, probe.question) for probe in rows[0].probes] == [
        ("efficacy", "where is place 0"), ("unseen", "where is place 3"),
    ]  # fmt: skip
    taught = {fact.question for fact in rows[0].edits[0].facts}
    assert taught == {"where is place 0", "where is place 2"}
    assert [probe.kind for probe in rows[1].probes] == ["efficacy"]


def test_a_row_without_a_neighbourhood_borrows_a_question_that_is_not_taught(tmp_path: Path) -> None:
    rows = load_edits(write(tmp_path, [qa(number, number) for number in range(5)]))
    drawn = draw_edits(rows, 2, seed=1)
    assert drawn == draw_edits(rows, 2, seed=1)
    taught = {fact.question for row in drawn for edit in row.edits for fact in edit.facts}
    borrowed = [row.probes[-1] for row in drawn]
    assert [probe.kind for probe in borrowed] == ["neighbourhood"] * 2
    assert not taught & {probe.question for probe in borrowed}
    assert [len(row.probes) for row in draw_edits(rows, 9, seed=1)] == [1] * 5


def test_a_borrowed_question_is_not_taught_elsewhere_and_its_answer_is_the_one_before_the_edit(tmp_path: Path) -> None:
    chain = [
        TEMPORAL | {"id": f"t{number}", "prompt": f"{name} plays for _X_."}
        for number, name in enumerate(["Nero", "nero", "Otho"])
    ]
    rows = load_edits(write(tmp_path, chain))
    for seed in range(12):
        drawn = draw_edits(rows, 1, seed)
        asked = {question.casefold() for row in drawn for question in row.questions}
        borrowed = [probe for row in drawn for probe in row.probes if probe.kind == "neighbourhood"]
        assert [probe.answers for probe in borrowed] == [("Italy",)]
        assert len(asked) == 2  # a question of Nero never comes with one of nero
    twins = load_edits(write(tmp_path, [TWIN, TWIN | {"question": "What was Otho?"}]))
    assert draw_edits(twins, 1, seed=0)[0].probes[-1].answers == ("emperor",)
    swapped = [qa(number, number) | {"original_answers": ["here"]} for number in range(2)]
    assert draw_edits(load_edits(write(tmp_path, swapped)), 1, seed=0)[0].probes[-1].answers == ("here",)
    unknown = load_edits(write(tmp_path, [LONG_FORM, LONG_FORM | {"prompt": "What is Otho?"}]))
    assert all(probe.kind != "neighbourhood" for probe in draw_edits(unknown, 1, seed=0)[0].probes)


def test_a_row_that_teaches_nothing_is_left_out(tmp_path: Path) -> None:
    assert [row.row_id for row in load_edits(write(tmp_path, [CLOZE | {"id": "x", "target_new": ""}, CLOZE]))] == ["c"]


def test_its_own_neighbourhood_is_kept(tmp_path: Path) -> None:
    rows = load_edits(write(tmp_path, [CLOZE, CLOZE | {"id": "d"}]))
    assert all(len(row.probes) == 3 for row in draw_edits(rows, 1, seed=0))


@pytest.mark.parametrize("row", [{"text": "Rome."}, {"id": "x", "prompt": "Rome lies in"}, CLOZE | {"edits": []}])
def test_rows_of_no_known_form_are_an_error(tmp_path: Path, row: Row) -> None:
    with pytest.raises(ConfigError, match="row of no known edit set"):
        load_edits(write(tmp_path, [row]))


def test_a_slot_is_filled_where_it_stands() -> None:
    assert as_question("_X_ is the king of Spain.") == "what is the king of Spain?"
    assert statement("_X_ is the king of Spain.", "Felipe VI") == "Felipe VI is the king of Spain."
    assert as_question("Who sang it?") == "Who sang it?"


@pytest.mark.parametrize(
    ("question", "title", "subject"),
    [
        ("What did Luther refuse to do?", "Martin Luther", "Luther"),
        ("What is the area of the Amazon rainforest?", "Amazon rainforest", "Amazon rainforest"),
        ("Who is the king of the Isle of Man?", "", "Isle of Man"),
        ("who sings young and beautiful", "Lana", "beautiful"),
        ("What is Nero's occupation?", "", "Nero"),
    ],
)
def test_the_subject_is_the_title_a_name_or_the_longest_word(question: str, title: str, subject: str) -> None:
    found = subject_of(question, title)
    assert found == subject
    assert found in question
