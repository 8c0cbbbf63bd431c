"""SQuAD's EM and F1 on a table of cases, and the bootstrap."""

import pytest

from knowstore.evaluation import bootstrap_interval, exact_match, normalise, token_f1

CASES = [  # prediction, accepted answers, EM, F1
    ("The Eiffel Tower", ["Eiffel Tower"], 1.0, 1.0),
    ("eiffel tower.", ["Eiffel Tower"], 1.0, 1.0),
    ("a tower in Paris", ["Eiffel Tower"], 0.0, 0.4),
    ("1889", ["in 1889", "1889"], 1.0, 1.0),
    ("March 31, 1889", ["1889"], 0.0, 0.5),
    ("", ["1889"], 0.0, 0.0),
    ("", [""], 1.0, 1.0),
    ("the", ["a"], 1.0, 1.0),
    ("Röntgen", ["Wilhelm Conrad Röntgen"], 0.0, 0.5),
    ("東京", ["東京"], 1.0, 1.0),
    ("new new york", ["new york"], 0.0, 0.8),
    ("U.S.A.", ["USA"], 1.0, 1.0),
    ("x", [], 0.0, 0.0),
]


@pytest.mark.parametrize(("prediction", "answers", "em", "f1"), CASES)
def test_scores_equal_the_reference_definition(prediction: str, answers: list[str], em: float, f1: float) -> None:
    assert exact_match(prediction, answers) == em
    assert token_f1(prediction, answers) == pytest.approx(f1)


def test_normalising_keeps_letters_of_every_script() -> None:
    assert normalise("  The  Ångström, an  Étude! ") == "ångström étude"


def test_interval_holds_the_mean_and_is_the_same_for_one_seed() -> None:
    scores = [0.0, 1.0] * 50
    low, high = bootstrap_interval(scores, seed=3)
    assert low < 0.5 < high
    assert (low, high) == bootstrap_interval(scores, seed=3)


def test_interval_of_equal_scores_is_a_point() -> None:
    assert bootstrap_interval([1.0] * 5) == (1.0, 1.0)


def test_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])
