"""A few trials of the harness; `python -m tests.faults --help` says how to run thousands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.command import c_compiler, report

ROOT = Path(__file__).parents[2]


def test_a_few_kills_failing_disks_and_seconds_of_use_by_many_lose_nothing() -> None:
    command = "-m tests.faults --scenes 1 --kills 6 --commands create ingest purge --soak 3 --seed 1"
    disk = ["--disk", "211"] if c_compiler() else []
    done = subprocess.run(
        [sys.executable, *command.split(), *disk], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    n_kills = [int(n) for n in re.findall(r"trials, (\d+) kills", done.stdout)]  # of each table
    assert n_kills[0] >= 6
    assert len(n_kills) == 1 + len(disk) // 2
    assert "SQLite" in done.stdout


def test_to_have_tried_nothing_counts_as_bad(capsys: pytest.CaptureFixture[str]) -> None:
    assert report("A failing disk", []) == 1
    assert "A failing disk: nothing was tried" in capsys.readouterr().out
