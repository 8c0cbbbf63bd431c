"""Locality, contradictions and residue of an audit, counted by hand."""

from dataclasses import replace
from typing import Any

import pytest

from knowstore.audits.results import History, measure
from knowstore.catalog import Score
from knowstore.records import Probe, ProbeAnswer, ProbeKind, ProbeState

PROBES = {
    number: Probe(question, answers, kind, None, 1, number)
    for number, (question, answers, kind) in enumerate(
        [
            ("Who wrote Faust?", ("Goethe",), "locality"),
            ("Who wrote Emma?", (), "locality"),
            ("How high is it?", ("3 m",), "reliability"),
            ("How high is it?", ("5 m",), "reliability"),
            ("Who opened it?", ("Ada",), "removed"),
            ("Who closed it?", ("Bo",), "removed"),
        ],
        1,
    )
}
UNTOUCHED = {"Who wrote Faust?": "Goethe.", "Who wrote Emma?": "a dog", "Who opened it?": "Ada", "Who closed it?": "x"}


def answered(
    number: int, text: str, state: ProbeState = "current", *, by: int | None = None, told: bool = False,
    ranks: tuple[int | None, int | None] = (None, None), mounted: bool = False,
) -> ProbeAnswer:  # fmt: skip
    em = float(text in PROBES[number].answers)
    experts = (("a" * 32, 1.0, 1),) if mounted else ()
    untouched = UNTOUCHED.get(PROBES[number].question)
    return ProbeAnswer(number, text, em, em, *ranks, told, experts, untouched, state, by)


def part(name: str, *answers: ProbeAnswer) -> Any:
    return measure(answers, PROBES)[name]


def test_unrelated_answers_are_compared_with_the_untouched_models() -> None:
    found = part("locality", answered(1, "goethe"), answered(2, "A cat", mounted=True))
    assert (found["n"], found["same"], found["mounted"]) == (2, 0.5, 0.5)
    assert (found["em"], found["em_untouched"]) == (0.0, 1.0)  # of the one with accepted answers; "goethe" != "Goethe"


@pytest.mark.parametrize(("text", "outcome"), [("5 m", "newer"), ("3 m", "older"), ("a lot", "neither")])
def test_the_newer_or_the_older_fact_is_told(text: str, outcome: str) -> None:
    both = answered(3, text, "contested", by=4, ranks=(2, 1))
    alone = answered(3, "5 m", "contested", by=4, ranks=(None, 1))
    found = part("contradictions", both, alone)
    assert found["n"] == 2
    assert {name: found["both_retrieved"][name] for name in ("n", "newer", "older", "neither")} == {
        "n": 1, "newer": 0, "older": 0, "neither": 0, outcome: 1
    }  # fmt: skip
    assert found["both_retrieved"]["rate"] == {"newer": 1.0, "older": 0.0, "neither": None}[outcome]
    assert found["newer_exact"] == 1 + (outcome == "newer")


def test_only_probes_that_name_their_passage_count_as_retrieved_or_not() -> None:
    named = replace(PROBES[4], passage_id="b" * 32)
    answers = [answered(3, "3 m"), answered(4, "5 m", ranks=(1, None))]
    kinds: Any = measure(answers, PROBES | {4: named})["kinds"]
    assert (kinds["reliability"]["n"], kinds["reliability"]["retrieved"]) == (2, 1.0)
    assert part("kinds", answered(3, "3 m"))["reliability"]["retrieved"] is None


def test_contested_and_removed_facts_are_in_no_score() -> None:
    kinds: dict[ProbeKind, Any] = part(
        "kinds", answered(3, "3 m", "contested", by=4), answered(4, "5 m"), answered(5, "Ada", "gone")
    )
    assert {kind: (found["n"], found["em"]) for kind, found in kinds.items()} == {"reliability": (1, 1.0)}


def test_a_removed_fact_leaks_when_nothing_else_explains_it() -> None:
    found = part("residue", answered(5, "Ada", "gone"), answered(6, "x", "gone"))
    assert (found["n"], found["answered"], found["known"], found["leaked"], found["rate"]) == (2, 1, 1, 0, 0.0)
    found = part("residue", answered(6, "Bo", "gone", told=True))
    assert (found["answered"], found["told"], found["leaked"]) == (1, 1, 0)
    found = part("residue", answered(6, "Bo", "gone"), answered(5, "no", "gone", ranks=(3, None)))
    assert (found["answered"], found["leaked"], found["rate"], found["retrieved"]) == (1, 1, 0.5, 1)


def test_nothing_asked_is_no_rate() -> None:
    found = measure([], {})
    assert found["kinds"] == {}
    assert {found[name]["n"] for name in ("locality", "contradictions", "residue")} == {0}  # type: ignore[index]


def test_what_is_not_to_be_known_any_more_is_not_forgotten() -> None:
    scores = [
        Score(1, 4, 1, 4, "reliability", "current", 1.0, 1.0),
        Score(1, 4, 2, 4, "reliability", "current", 0.0, 0.5),
        Score(1, 4, 3, 4, "reliability", "current", 1.0, 1.0),
        Score(1, 4, 4, 4, "locality", "current", 1.0, 1.0),
        Score(2, 5, 1, 4, "reliability", "current", 1.0, 1.0),
        Score(2, 5, 2, 4, "reliability", "contested", 0.0, 0.0),
        Score(2, 5, 3, 4, "reliability", "gone", 0.0, 0.0),
        Score(2, 5, 5, 5, "portability", "current", 0.0, 0.0),
        Score(3, 5, 5, 5, "portability", "current", 1.0, 1.0),
    ]
    history = History.of(scores, {1, 5})
    matrix = history.matrix(lambda one: one.em)
    assert (matrix.after, matrix.batches, matrix.rows()) == ((4, 5), (4, 5), [[1.0, None], [1.0, 1.0]])
    assert history.changes(lambda one: one.em) == [[0.0]]
    assert history.last_groups(lambda one: one.em) == [[1.0], [1.0]]
    only_then = History.of(scores[:4], {1, 2, 3, 4})
    assert only_then.matrix(lambda one: one.f1).rows() == [[pytest.approx(2.5 / 3)]]
