"""Peak memory of an ingest with stand-ins for the models: `python -m tests.resources.memory --help`.

What is measured is what knowstore and its stores hold, not the models: vectors and experts are random, of the sizes
of the default models. Prints one JSON object per line: passages written so far and resident bytes.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from knowstore.store import KnowledgeStore
from tests.standins import StandInModels

WORDS = (
    "the",
    "island",
    "harbour",
    "keeper",
    "stone",
    "winter",
    "market",
    "bridge",
    "river",
    "council",
    "boat",
    "slate",
)


def write_rows(path: Path, size_bytes: int) -> int:
    """JSON Lines of random words, about 100 a row, until the file has `size_bytes`; returns how many rows."""
    random = np.random.default_rng(0)
    n_rows = 0
    with path.open("w") as file:
        while file.tell() < size_bytes:
            words = random.choice(WORDS, 100)
            text = ". ".join(" ".join(words[first : first + 12]).capitalize() for first in range(0, 100, 12))
            file.write(json.dumps({"title": f"Row {n_rows}", "text": f"{text} {n_rows}."}) + "\n")
            n_rows += 1
    return n_rows


def resident_bytes() -> int:
    """What the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Write a file, plan or ingest it, and print the memory on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--plan", action="store_true", help="dry run only")
    parser.add_argument(
        "--folder", type=Path, help="where the file and the store are made; a temporary one if not given"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        n_rows = write_rows(folder / "rows.jsonl", options.megabytes * 1_000_000)
        print(json.dumps({"rows": n_rows, "resident_mb": resident_bytes() // 1_000_000}), flush=True)
        seen = SimpleNamespace(next=0)

        def on_progress(stage: str, done: int, total: int | None) -> None:
            if done >= seen.next or done == total:
                seen.next = done + 2_000 if done != total else 0
                print(
                    json.dumps({"stage": stage, "done": done, "resident_mb": resident_bytes() // 1_000_000}), flush=True
                )

        with KnowledgeStore.open(folder / "kb", on_progress=on_progress) as store:
            store.models = StandInModels()
            store.models.on_progress = on_progress
            if options.plan:
                print(store.plan([str(folder / "rows.jsonl")]).new)
            else:
                print(store.ingest([str(folder / "rows.jsonl")]).passages_added)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"peak_mb": peak * 1024 // 1_000_000}))


if __name__ == "__main__":
    main()
