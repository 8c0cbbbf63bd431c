"""What a probe is to an audit, and which probes are asked."""

import pytest

from knowstore.audits.roles import Selection, roles
from knowstore.errors import ConfigError
from knowstore.records import Asked, Probe, ProbeKind

A, B, C = "a" * 32, "b" * 32, "c" * 32


def probe(
    number: int, batch: int, answers: str, passage: str | None, *, kind: ProbeKind = "reliability", about: str = "rain"
) -> Probe:
    return Probe(f"How much {about}?", tuple(answers.split("|")), kind, passage, batch, number)


def test_a_probe_goes_with_its_passage_and_one_without_with_its_whole_batch() -> None:
    probes = [
        probe(1, 1, "x", A), probe(2, 1, "x", B, about="snow"), probe(3, 2, "x", None, about="wind"),
        probe(4, 3, "x", None, about="hail"), probe(5, 2, "x", B, kind="locality"),
        probe(6, 3, "x", None, kind="removed"),
    ]  # fmt: skip
    found = roles(probes, {A}, {2})
    assert [found[one.id].state for one in probes] == ["current", "gone", "gone", "current", "current", "gone"]


def test_a_fact_that_the_next_version_of_its_passage_still_tells_is_not_gone() -> None:
    probes = [probe(1, 1, "x|y", A), probe(2, 1, "z", A, about="snow"), probe(3, 2, "The X.", B)]
    found = roles(probes, {B}, set())
    assert [found[n].state for n in (1, 2, 3)] == ["current", "gone", "current"]
    assert roles(probes, set(), set())[1].state == "gone"


def test_a_newer_batch_with_other_answers_contests_an_older_one() -> None:
    probes = [probe(1, 1, "3 mm|3", A), probe(2, 4, "5 mm", B), probe(3, 7, "The 7 mm.", C)]
    assert roles(probes, {A, B, C}, set()) == {
        1: Asked(1, "contested", 3), 2: Asked(2, "contested", 3), 3: Asked(3, "current"),
    }  # fmt: skip
    without_the_newest = roles(probes, {A, B}, set())
    assert [without_the_newest[n].contested_by for n in (1, 2, 3)] == [2, None, None]
    assert without_the_newest[3].state == "gone"


@pytest.mark.parametrize("answers", ["about 3|3 mm", "the 3, mm"])
def test_a_newer_batch_that_agrees_contests_nothing(answers: str) -> None:
    found = roles([probe(1, 1, "3 mm", A), probe(2, 2, answers, B)], {A, B}, set())
    assert {one.state for one in found.values()} == {"current"}


def test_batches_do_not_contest_themselves_and_other_questions_are_left_alone() -> None:
    probes = [
        probe(1, 2, "3", A),
        probe(2, 2, "4", A),
        probe(3, 3, "5", B, about="snow"),
        probe(4, 3, "6", None, kind="locality"),
    ]
    assert {one.state for one in roles(probes, {A, B}, set()).values()} == {"current"}


def test_other_words_for_a_contested_fact_are_contested_with_it() -> None:
    probes = [
        probe(1, 1, "3 mm", A), probe(2, 1, "3 mm|three", A, kind="paraphrase", about="water"),
        probe(3, 1, "4 mm", A, about="snow"), probe(4, 2, "5 mm", B),
    ]  # fmt: skip
    found = roles(probes, {A, B}, set())
    assert [found[n].contested_by for n in (1, 2, 3, 4)] == [4, 4, None, None]


def test_a_sample_is_of_each_batch_and_kind_and_stays_the_same_when_batches_come() -> None:
    old = [probe(n, n % 2, "x", A, about=str(n)) for n in range(40)]
    new = [probe(n, 2, "x", A, kind="paraphrase") for n in range(40, 43)]
    chosen = Selection(sample=4, seed=1).choose(old)
    assert [sum(one.batch_id == batch for one in chosen) for batch in (0, 1)] == [4, 4]
    assert Selection(sample=4, seed=1).choose(old + new) == [*chosen, *new]
    assert Selection(sample=4, seed=2).choose(old) != chosen
    with pytest.raises(ConfigError, match="sample is 0"):
        Selection(sample=0)


def test_batches_can_be_named() -> None:
    probes = [probe(n, n, "x", A) for n in range(1, 6)]
    assert [one.id for one in Selection(batches=(1, 4, 9)).choose(probes)] == [1, 4]
    assert [one.id for one in Selection(since=4).choose(probes)] == [4, 5]
