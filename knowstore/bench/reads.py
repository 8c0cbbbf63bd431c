"""Reading experts from banks of several sizes: from disk, from what the system keeps of it, and from memory."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from knowstore.bank import EncodedExpert, ExpertBank, StoredExpert
from knowstore.evaluation import median_ratio

_N_TOGETHER = 5  # experts that one read asks for
_N_READS = 200
_N_BEFORE = 10  # reads of each bank that are not measured: after some, a bank knows where its experts are
_CACHE_BYTES = 1 << 30
_BATCH = 1
_CAN_FORGET = hasattr(os, "posix_fadvise")


def measure_reads(
    experts: Sequence[EncodedExpert], sizes: Sequence[int], *, seed: int = 0
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Fill a bank of each size with real experts, their numbers moved about under new ids, and read five at a time,
    from every bank in turn, after some reads that are not measured.

    Args:
        experts: what is copied; all of one fingerprint and codec.
        sizes: numbers of experts, each of a bank in a temporary folder; all are there at once.

    Returns: rows of {experts, place, n, p50_s, p99_s, size_bytes}, `place` being `disk` (nothing of the bank in memory;
        where the system can be told to forget files), `system` (files in the system's cache) or `memory` (decoded); and
        ratios of the largest bank to the smallest at each place.
    """
    with ExitStack() as folders:
        banks = [_filled(experts, size, folders) for size in sorted(set(sizes))]
        taken = _read_in_turn(banks, seed)
    rows: list[dict[str, object]] = []
    for bank in banks:
        for place, seconds in taken[bank.size].items():
            p50, p99 = (float(np.percentile(seconds, share)) for share in (50, 99))
            rows.append({"experts": bank.size, "place": place, "n": len(seconds), "p50_s": p50, "p99_s": p99,
                         "size_bytes": bank.size_bytes})  # fmt: skip
    small, large = min(sizes), max(sizes)
    ratios: list[dict[str, object]] = []
    for place in taken[small] if large > small else ():
        ratio, low, high = median_ratio(taken[large][place], taken[small][place], seed=seed)
        ratios.append({"name": f"read_{place}_{large}_over_{small}", "ratio": ratio, "low": low, "high": high})
    return rows, ratios


@dataclass(frozen=True)
class _FilledBank:
    bank: ExpertBank
    folder: Path
    size: int
    size_bytes: int


def _filled(experts: Sequence[EncodedExpert], size: int, folders: ExitStack) -> _FilledBank:
    """A bank of copies, all of it written to disk, in a folder that goes away with `folders`."""
    folder = folders.enter_context(TemporaryDirectory(prefix="knowstore-reads-", ignore_cleanup_errors=True))
    bank = ExpertBank.open(folder, fingerprint=experts[0].fingerprint, create=True, cache_bytes=_CACHE_BYTES)
    bank.add(_copies(experts, size), experts[0].codec, _BATCH)
    bank.optimize()
    if _CAN_FORGET:
        for descriptor in _opened(Path(folder)):
            os.fsync(descriptor)  # what is not written yet is not forgotten
    return _FilledBank(bank, Path(folder), size, bank.size_bytes())


def _read_in_turn(banks: Sequence[_FilledBank], seed: int) -> dict[int, dict[str, list[float]]]:
    """Seconds of reads by size and place; round n reads every bank, so that the n-th figures belong together."""
    drawn = random.Random(seed)
    taken: dict[int, dict[str, list[float]]] = {one.size: {} for one in banks}
    for read in range(_N_BEFORE + _N_READS):
        for one in drawn.sample(banks, len(banks)):
            ids = [_id(number) for number in drawn.sample(range(one.size), min(_N_TOGETHER, one.size))]
            for place in ("disk", "system", "memory"):
                if place != "memory":
                    one.bank.forget()
                if place == "disk" and not _drop_from_system(one.folder):
                    continue
                started = time.perf_counter()
                one.bank.get(ids)
                if read >= _N_BEFORE:
                    taken[one.size].setdefault(place, []).append(time.perf_counter() - started)
    return taken


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
    if not _CAN_FORGET:
        return False
    for descriptor in _opened(folder):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _opened(folder: Path) -> Iterator[int]:
    """A descriptor of each file in a folder, closed again when the next one comes."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                yield file.fileno()
