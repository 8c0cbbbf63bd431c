"""Reading experts from banks of several sizes: from disk, from what the system keeps of it, and from memory."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from knowstore.bank import EncodedExpert, ExpertBank, StoredExpert
from knowstore.evaluation import median_ratio

N_TOGETHER = 5
"""How many experts one read asks for."""

_N_READS = 60
_CACHE_BYTES = 1 << 30
_BATCH = 1


def measure_reads(
    experts: Sequence[EncodedExpert], sizes: Sequence[int], *, seed: int = 0
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Fill a bank of each size with real experts, their numbers moved about under new ids, and read five at a time.

    Args:
        experts: what is copied; all of one fingerprint and codec.
        sizes: numbers of experts, each of a bank in a temporary folder.

    Returns: rows of {experts, place, n, p50_s, p99_s, size_bytes}, `place` being `disk` (nothing of the bank in memory;
        where the system can be told to forget files), `system` (files in the system's cache) or `memory` (decoded); and
        ratios of the largest bank to the smallest at each place.
    """
    taken = {size: _read_bank(experts, size, seed) for size in sizes}
    rows: list[dict[str, object]] = []
    for size, (size_bytes, by_place) in taken.items():
        for place, seconds in by_place.items():
            p50, p99 = (float(np.percentile(seconds, share)) for share in (50, 99))
            rows.append({"experts": size, "place": place, "n": len(seconds), "p50_s": p50, "p99_s": p99,
                         "size_bytes": size_bytes})  # fmt: skip
    small, large = min(sizes), max(sizes)
    ratios: list[dict[str, object]] = []
    for place in taken[small][1] if large > small else ():
        ratio, low, high = median_ratio(taken[large][1][place], taken[small][1][place], seed=seed)
        ratios.append({"name": f"read_{place}_{large}_over_{small}", "ratio": ratio, "low": low, "high": high})
    return rows, ratios


def _read_bank(experts: Sequence[EncodedExpert], size: int, seed: int) -> tuple[int, dict[str, list[float]]]:
    with TemporaryDirectory(prefix="knowstore-reads-", ignore_cleanup_errors=True) as folder:
        bank = ExpertBank.open(folder, fingerprint=experts[0].fingerprint, create=True, cache_bytes=_CACHE_BYTES)
        bank.add(_copies(experts, size), experts[0].codec, _BATCH)
        bank.optimize()
        drawn = random.Random(seed)
        seconds: dict[str, list[float]] = {"disk": [], "system": [], "memory": []}
        for _ in range(_N_READS):
            ids = [_id(number) for number in drawn.sample(range(size), min(N_TOGETHER, size))]
            for place in seconds:
                if place != "memory":
                    bank.forget()
                if place == "disk" and not _drop_from_system(Path(folder)):
                    continue
                started = time.perf_counter()
                bank.get(ids)
                seconds[place].append(time.perf_counter() - started)
        return bank.size_bytes(), {place: some for place, some in seconds.items() if some}


def _copies(experts: Sequence[EncodedExpert], size: int) -> Iterator[StoredExpert]:
    """No two of the same bytes, which LanceDB would keep once."""
    originals = [expert.decode() for expert in experts]
    for number in range(size):
        one = originals[number % len(originals)]
        tensors = {name: np.roll(array, number) for name, array in one.tensors.items()}
        yield replace(one, passage_id=_id(number), tensors=tensors)


def _id(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15 % (1 << 128):032x}"  # spread, as digests are


def _drop_from_system(folder: Path) -> bool:
    """Have the system forget what it holds of the files in a folder; whether it can be told to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # what is not written yet is not forgotten
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
    return True
