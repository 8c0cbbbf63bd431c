"""Statements of which the newer one takes the place of the older, told by their words alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from knowstore._answering import twins

TEAMS = "In 2019, Ann Mori plays for FC Halden.", "In 2020, Ann Mori plays for the Kirrin Town Rovers."
WORKS = "Ann Mori now works as a keeper.", "Ann Mori now works as a Mayor of all Kirrin."
LONG = [10 * "The isle has a hill. " + end for end in ("It is old.", 9 * "Ann went by bus. ")]


@pytest.mark.parametrize(
    ("question", "texts", "are_twins"),
    [
        ("Who does Ann Mori play for?", TEAMS, True),
        ("Whom did Ann Mori play for in 2019?", TEAMS, False),
        ("What does Ann Mori work as?", WORKS, True),
        ("Is Ann Mori a keeper?", WORKS, False),
        ("Where is the ferry?", ("The ferry to Kirrin is in dock.", "The ferry to Kirrin is near Halden today."), True),
        ("What does Ann like?", ("Ann likes tea.", "Ann likes coffee."), False),
        ("Who is mayor?", ("Ann Mori is the mayor of Kirrin.", "Tom Rae is the mayor of Halden."), False),
        ("What lies there?", ("Tarvan has a harbour.", "Tarvan has a harbour and a hoard of coins."), True),
        ("What is on the isle?", LONG, False),
        ("What is it?", [4 * f"{300 * 'x'} is " + end for end in ("old.", "new but " + 300 * "y" + ".")], False),
        ("What?", ("", ""), True),
        ("What?", ("", "Tarvan has a harbour."), False),
    ],
)
def test_statements_that_differ_in_one_place_are_twins_unless_the_question_tells_them_apart(
    question: str, texts: Sequence[str], are_twins: bool
) -> None:
    for pair in (texts, texts[::-1]):
        assert twins(question, [("Tarvan", text) for text in pair], 0.6) == [(0, 1)] * are_twins
    assert not twins(question, [("Tarvan", texts[0]), ("Isle", texts[1])], 0.6)
