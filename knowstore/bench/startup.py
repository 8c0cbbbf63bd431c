"""How long the command takes to be there: its help, and the first question to a store."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from knowstore.errors import ConfigError

_HELPS = 3


def measure_startup(command: Sequence[str], store: Path, question: str) -> dict[str, float]:
    """Start the command anew several times; medians in seconds of wall time.

    Settings of the caller's environment (`KNOWSTORE_STORE` and the like) are kept from it: the store is asked as it is.

    Args:
        command: what starts `knowstore`, as arguments of a process.
        store: a store with passages.
        question: what to ask it.

    Returns: `help_s`, and `first_ask_s` with every model loaded from disk and one answer.

    Raises:
        ConfigError: the command failed.
    """
    helps = [_seconds([*command, "--help"]) for _ in range(_HELPS)]
    ask = _seconds([*command, "--store", str(store), "ask", question, "--quiet"])
    return {"help_s": median(helps), "first_ask_s": ask}


def _seconds(command: Sequence[str]) -> float:
    started = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KNOWSTORE_")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=environment
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise ConfigError(
            f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()[-500:]}",
            kept="nothing was measured",
            fix="mend what it says; `knowstore doctor` may tell more",
        )
    return seconds
