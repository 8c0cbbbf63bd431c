"""A few hundred inputs of each fuzz target; `python -m tests.fuzz` runs as many as one likes."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import run
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_a_reader(name: str) -> None:
    assert run(TARGETS[name], 60, 1) >= 40
