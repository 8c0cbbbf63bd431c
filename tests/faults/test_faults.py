"""A few trials of the harness; `python -m tests.faults --help` says how to run thousands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_few_kills_failing_disks_and_seconds_of_use_by_many_lose_nothing() -> None:
    command = "-m tests.faults --scenes 1 --kills 6 --disk 211 --commands create ingest purge --soak 3 --seed 1"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills" in done.stdout or "7 kills" in done.stdout
    assert "SQLite" in done.stdout
