"""The measurement of `tests.resources` at a size that takes no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.resources.memory import measure


@pytest.mark.parametrize("is_planned", [False, True])
def test_every_row_is_counted_and_the_peak_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_planned: bool
) -> None:
    measure(tmp_path, 20_000, is_planned=is_planned)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["rows"] == lines[-1]["new"] > 20
    assert lines[-1]["peak_mb"] > 0
