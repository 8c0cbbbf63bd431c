"""A few hundred inputs of each fuzz target; `python -m tests.fuzz` runs as many as one likes."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from tests.fuzz.__main__ import run
from tests.fuzz.targets import TARGETS, Target, mutations


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_a_reader(name: str) -> None:
    assert run(TARGETS[name], 60, 1) >= 40


def test_inputs_of_bytes_can_be_damaged_many_times_each() -> None:
    seen: list[bytes] = []
    assert run(Target(st.binary(min_size=20, max_size=30), seen.append), 60, 1, n_mutations=10) >= 60
    assert len(set(seen)) > 50
    assert list(mutations(b"abc" * 9, 4)) == list(mutations(b"abc" * 9, 4))


def test_a_target_that_breaks_is_raised_and_time_that_is_up_begins_no_round() -> None:
    def check(value: int) -> None:
        assert value < 5

    target = Target(st.integers(0, 9), check)
    with pytest.raises(AssertionError):
        run(target, 60, 1)
    assert run(target, 60, 1, seconds=0) == 0
