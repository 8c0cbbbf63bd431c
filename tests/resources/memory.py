"""Peak memory of an ingest with stand-ins for the models:

    python -m tests.resources.memory --megabytes 300
    python -m tests.resources.memory --megabytes 300 --plan

Prints a JSON object a line: the resident bytes (`resident_mb`) at the start and after every 2,000 rows or passages of
each stage, how many passages are new, and the peak (`peak_mb`). Models are not among it.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from knowstore.config import BankConfig
from knowstore.store import KnowledgeStore
from tests.resources.models import StandInModels

_WORDS = ["the", "island", "harbour", "keeper", "stone", "winter", "market", "bridge", "river", "boat", "slate"]
_EVERY = 2_000  # rows or passages between two lines


def main() -> None:
    """Write a file, plan or ingest it, and print the memory on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300, help="size of the file")
    parser.add_argument("--plan", action="store_true", help="dry run only")
    parser.add_argument("--folder", type=Path, help="where the file and the store are made, else a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        measure(Path(name), options.megabytes * 1_000_000, is_planned=options.plan)


def measure(folder: Path, size_bytes: int, *, is_planned: bool) -> None:
    """Plan or ingest a file of that size in a folder that is empty."""
    file = folder / "rows.jsonl"
    _say(rows=write_rows(file, size_bytes))
    due: Counter[str] = Counter()

    def on_progress(stage: str, done: int, total: int | None) -> None:
        if done >= due[stage] or done == total:
            due[stage] = done + _EVERY
            _say(stage=stage, done=done)

    bank = BankConfig(codec="float16")  # of experts, which the stand-ins make
    with KnowledgeStore.open(folder / "kb", bank=bank, on_progress=on_progress) as store:
        store.models = StandInModels()
        store.models.on_progress = on_progress
        n_new = store.plan([str(file)]).new if is_planned else store.ingest([str(file)]).passages_added
    _say(new=n_new, peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 1_000_000)


def write_rows(path: Path, size_bytes: int) -> int:
    """JSON Lines of random words, about 100 a row, until the file has `size_bytes`; returns how many rows."""
    random = np.random.default_rng(0)
    n_rows = 0
    with path.open("w") as file:
        while file.tell() < size_bytes:
            words = random.choice(_WORDS, 100)
            text = ". ".join(" ".join(words[first : first + 12]).capitalize() for first in range(0, 100, 12))
            file.write(json.dumps({"title": f"Row {n_rows}", "text": f"{text} {n_rows}."}) + "\n")
            n_rows += 1
    return n_rows


def _say(**what: object) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    print(json.dumps({**what, "resident_mb": pages * resource.getpagesize() // 1_000_000}), flush=True)


if __name__ == "__main__":
    main()
