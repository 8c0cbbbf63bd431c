"""Ratios of medians over rounds."""

from __future__ import annotations

import pytest

from knowstore.evaluation import median_ratio


def test_a_ratio_of_medians_does_not_mind_rounds_in_which_everything_was_slow() -> None:
    below = [1.0, 1.1, 0.9, 40.0, 1.0, 30.0]
    ratio, low, high = median_ratio([3 * second for second in below], below, seed=1)
    assert (ratio, low, high) == pytest.approx((3.0, 3.0, 3.0))


def test_a_ratio_of_rounds_that_measured_one_of_the_two_is_refused() -> None:
    with pytest.raises(ValueError, match="not 2 and 1"):
        median_ratio([1.0, 2.0], [1.0])
