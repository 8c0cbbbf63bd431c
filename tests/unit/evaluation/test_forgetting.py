"""The forgetting matrix and what is read off it, against slow literal versions of their definitions."""

import itertools
import math
import random

import numpy as np
import pytest

from knowstore.evaluation import (
    average_score,
    backward_transfer,
    bootstrap_interval,
    forgetting_matrix,
    forward_effect,
    grouped_interval,
    paired_p_value,
    proportion_interval,
)

Scored = list[tuple[int, int, float]]


def audited(seed: int, n_batches: int = 5, n_probes: int = 4) -> Scored:
    """Random scores of an audit after every batch; ids are not consecutive, as edit batches' are not."""
    draw = random.Random(seed)
    ids = sorted(draw.sample(range(1, 40), n_batches))
    return [(t, i, draw.random()) for t in ids for i in ids if i <= t for _ in range(n_probes)]


def literal(scored: Scored) -> dict[tuple[int, int], float]:
    cells: dict[tuple[int, int], list[float]] = {}
    for t, i, score in scored:
        cells.setdefault((t, i), []).append(score)
    return {place: sum(some) / len(some) for place, some in cells.items()}


@pytest.mark.parametrize("seed", range(5))
def test_the_matrix_and_its_measures_are_those_of_the_definitions(seed: int) -> None:
    scored = audited(seed)
    matrix, R = forgetting_matrix(scored), literal(scored)
    ids = matrix.after
    assert ids == matrix.batches == tuple(sorted({t for t, _, _ in scored}))
    for t, i in itertools.product(range(len(ids)), repeat=2):
        found = matrix.rows()[t][i]
        assert found == (None if i > t else pytest.approx(R[ids[t], ids[i]]))
        assert matrix.counts[t, i] == (0 if i > t else 4)
    last = ids[-1]
    assert average_score(matrix) == pytest.approx(sum(R[last, i] for i in ids) / len(ids))
    assert backward_transfer(matrix) == pytest.approx(sum(R[last, i] - R[i, i] for i in ids[:-1]) / (len(ids) - 1))
    assert forward_effect(matrix) == pytest.approx(sum(R[i, i] for i in ids[1:]) / (len(ids) - 1) - R[ids[0], ids[0]])


def test_scores_that_never_change_forget_nothing() -> None:
    matrix = forgetting_matrix([(t, i, i / 4) for t in range(1, 4) for i in range(1, t + 1)])
    assert backward_transfer(matrix) == 0.0
    assert forward_effect(matrix) == pytest.approx(2.5 / 4 - 1 / 4)


def test_audits_need_not_follow_every_batch_nor_ask_everything() -> None:
    matrix = forgetting_matrix([(3, 1, 1.0), (3, 2, 0.5), (6, 1, 0.5), (6, 5, 1.0)])
    assert matrix.rows() == [[1.0, 0.5, None], [0.5, None, 1.0]]
    assert average_score(matrix) == 0.75
    assert backward_transfer(matrix) == -0.5
    assert forward_effect(matrix) == 0.25


def test_one_audit_or_none_says_nothing_of_change() -> None:
    for scored in ([], [(4, 1, 1.0), (4, 3, 0.0)]):
        matrix = forgetting_matrix(scored)
        assert math.isnan(backward_transfer(matrix))
        assert math.isnan(forward_effect(matrix))
    assert math.isnan(average_score(forgetting_matrix([])))


def test_the_interval_of_one_group_is_that_of_its_mean() -> None:
    scores = [0.0, 1.0, 0.0, 0.0, 1.0] * 3
    low, high = bootstrap_interval(scores, seed=4)
    wider = math.sqrt(15 / 14)
    wanted = 0.4 - (0.4 - low) * wider, 0.4 + (high - 0.4) * wider
    assert grouped_interval([scores, []], seed=4) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="at least one"):
        grouped_interval([[], []])


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_interval_of_small_groups_holds_the_mean_as_often_as_it_says(n: int) -> None:
    draw = np.random.default_rng(n)
    held = 0
    for number in range(200):
        groups = draw.integers(0, 2, (40, n)).astype(float)
        low, high = grouped_interval(groups.tolist(), seed=number, n_samples=400)
        held += low <= 0.5 <= high
    assert 0.89 <= held / 200 <= 0.99


def test_an_interval_stays_within_what_scores_can_be() -> None:
    assert grouped_interval([[0.0, 1.0]]) == (0.0, 1.0)
    assert grouped_interval([[1.0]]) == (1.0, 1.0)


def test_groups_count_alike_whatever_their_size() -> None:
    low, high = grouped_interval([[1.0] * 500, [0.0] * 3])
    assert (low, high) == (0.5, 0.5)


def test_many_scores_are_resampled_in_parts_as_in_one_go() -> None:
    scores = np.random.default_rng(0).integers(0, 2, 2_500).astype(float)
    means = scores[np.random.default_rng(7).integers(0, scores.size, (900, scores.size))].mean(axis=1)
    assert bootstrap_interval(list(scores), seed=7, n_samples=900) == pytest.approx(np.quantile(means, (0.025, 0.975)))


@pytest.mark.parametrize("differences", [[1, 1, 1, 1, -1, 0], [1, 1, 1, 1, 1], [0.5, -0.25, 0.125], [0, 0]])
def test_few_pairs_are_tested_under_all_signs(differences: list[float]) -> None:
    kept = [one for one in differences if one]
    sums = [
        abs(sum(s * d for s, d in zip(signs, kept, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(kept))
    ]
    expected = sum(one >= abs(sum(kept)) - 1e-9 for one in sums) / len(sums)
    assert paired_p_value(differences) == pytest.approx(expected)


def test_many_pairs_are_tested_under_random_signs() -> None:
    assert paired_p_value([1.0] * 30 + [-1.0] * 10) == pytest.approx(0.0022, abs=0.0015)  # McNemar's exact test
    assert paired_p_value([1.0, -1.0] * 20) == 1.0


@pytest.mark.parametrize(
    ("n_hits", "n", "low", "high"), [(0, 4, 0.0, 0.4899), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0)]
)
def test_proportions_have_wilsons_interval(n_hits: int, n: int, low: float, high: float) -> None:
    assert proportion_interval(n_hits, n) == pytest.approx((low, high), abs=1e-4)
    share, z2 = n_hits / n, 1.959964**2  # its ends solve (p - share)^2 = z^2 p (1 - p) / n
    for end in proportion_interval(n_hits, n):
        assert (end - share) ** 2 == pytest.approx(z2 * end * (1 - end) / n, abs=1e-6)


def test_a_proportion_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        proportion_interval(0, 0)
