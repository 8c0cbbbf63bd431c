"""Reads that go straight to an expert's rows give what a search for its id gives."""

from __future__ import annotations

import random
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from lancedb.table import LanceTable

from knowstore.bank import ExpertBank, StoredExpert, places
from knowstore.errors import BankError

N = 30
IDS = [f"{number * 0x9E3779B97F4A7C15 % (1 << 128):032x}" for number in range(N + 1)]
ABSENT = IDS.pop()


def _expert(passage_id: str, value: float) -> StoredExpert:
    tensors = {"up": np.full((4, 2), value, np.float32), "down": np.full((2, 4), value, np.float32)}
    return StoredExpert(passage_id, "neurons", tensors, (2,), 2)


@pytest.fixture
def bank(tmp_path: Path) -> ExpertBank:
    bank = ExpertBank.open(str(tmp_path), fingerprint="print", create=True, cache_bytes=0)
    for first in range(0, N, 10):
        bank.add([_expert(IDS[k], k) for k in range(first, first + 10)], "float32", batch_id=1)
    return bank


def _values(bank: ExpertBank, ids: list[str]) -> list[float]:
    found = bank.get(ids, allow_missing=True)
    return [float(one.tensors["up"][0, 0]) for one in found.values()]


def _read_often(bank: ExpertBank) -> None:
    draw = random.Random(0)
    for _ in range(10):
        some = draw.sample(range(N), 5)
        assert _values(bank, [IDS[k] for k in some]) == some


def test_experts_are_no_longer_searched_for_once_their_rows_are_known(
    bank: ExpertBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Mock(side_effect=LanceTable.search)
    monkeypatch.setattr(LanceTable, "search", lambda table, *rest: search(table, *rest))
    _read_often(bank)
    assert search.call_count == 7 + 1  # that of all ids
    assert _values(bank, [ABSENT, IDS[3]]) == [3]
    assert search.call_count == 9
    with pytest.raises(BankError, match=f"1 experts are not in the bank, {ABSENT}"):
        bank.get([ABSENT])


def test_what_was_written_since_is_read(bank: ExpertBank, tmp_path: Path) -> None:
    _read_often(bank)
    seen = bank.latest()
    _read_often(seen)
    bank.delete([IDS[0]])
    assert _values(bank, IDS[:2]) == [1]
    bank.add([_expert(IDS[1], 100)], "float32", batch_id=2)
    for _ in range(10):
        assert _values(bank, IDS[:3]) == [100, 2]
        assert _values(seen, IDS[:3]) == [0, 1, 2]
    other = ExpertBank.open(str(tmp_path), fingerprint="print")
    other.purge([IDS[2]])
    bank.refresh()
    for _ in range(10):
        assert _values(bank, IDS[:4]) == [100, 3]
    with pytest.raises(BankError, match="could not be read"):
        seen.get([IDS[2]])


def test_a_table_that_is_too_large_is_searched(bank: ExpertBank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_MOST_ROWS", N - 1)
    monkeypatch.setattr(LanceTable, "take_row_ids", Mock(side_effect=AssertionError))
    _read_often(bank)


def test_ids_of_one_key_are_told_apart(bank: ExpertBank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_keys", lambda ids: np.zeros(len(ids), np.uint64))
    _read_often(bank)


def test_ids_that_are_no_digests_are_searched(bank: ExpertBank) -> None:
    bank.add([_expert("short", 100)], "float32", batch_id=2)
    for _ in range(10):
        assert _values(bank, ["short", IDS[1]]) == [100, 1]
        assert _values(bank, [IDS[1], "bytes\udcff" * 5]) == [1]


def test_keys_of_ids_seldom_meet() -> None:
    ids = pa.chunked_array([[f"{number:032x}" for number in range(5000)]], pa.string()).cast(pa.binary())
    keys, later = places._keys(ids), places._keys(ids.slice(4000))
    assert keys is not None
    assert later is not None
    assert len(set(keys.tolist())) == 5000
    assert np.array_equal(later, keys[4000:])
