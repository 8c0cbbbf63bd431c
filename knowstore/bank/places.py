"""Where in LanceDB's table each expert is, in memory, so that a read goes straight to its rows.

Looking five ids up in the index takes LanceDB longer than reading their rows, and longer the more rows there are.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from lancedb.table import LanceTable
from numpy.typing import NDArray

from knowstore.lance import LANCE_ERRORS, run

_WORTH_READS = 8  # of one version, before all its ids are read: a process that asks once does not wait for them
_MOST_ROWS = 1 << 20  # 16 bytes each
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class _Places:
    """`keys` (N,), made of ids and sorted, and the `row_ids` (N,) that belong to them."""

    keys: NDArray[np.uint64]
    row_ids: NDArray[np.uint64]


class RowIds:
    """LanceDB's row ids by passage id, for one version of a table at a time; safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._version, self._n_reads = -1, 0
        self._places: _Places | None = None

    def read(self, table: LanceTable, ids: Sequence[str]) -> pa.Table | None:
        """The rows of ids, in no order; None when they must be searched for: soon after a write, in a large table, or
        where one of them is not stored."""
        asked = [one.encode("utf-8", "replace") for one in ids]
        places, keys = self._of(table), _keys(pa.chunked_array([asked], pa.binary()))
        if places is None or keys is None:
            return None
        first, last = (np.searchsorted(places.keys, keys, side) for side in ("left", "right"))
        row_ids = {int(row) for a, b in zip(first, last, strict=True) for row in places.row_ids[a:b]}
        if not row_ids:
            return None
        try:
            rows = run(lambda there: there.take_row_ids(sorted(row_ids)).to_arrow(), table)
        except LANCE_ERRORS:  # written meanwhile, by another thread; or damaged, which a search will tell
            return None
        wanted = set(ids)
        rows = rows.filter(pa.array([found in wanted for found in rows["id"].to_pylist()], pa.bool_()))
        return rows if len(rows) == len(wanted) else None

    def _of(self, table: LanceTable) -> _Places | None:
        """The places in the table's version, which are read when that seems worth it."""
        version = int(table.version)
        with self._lock:
            if version != self._version:
                self._version, self._n_reads, self._places = version, 0, None
            self._n_reads += 1
            is_due, places = self._n_reads == _WORTH_READS, self._places
        if is_due and (places := _read_places(table)) is not None:
            with self._lock:
                if version == self._version == int(table.version):
                    self._places = places
        return places


def _read_places(table: LanceTable) -> _Places | None:
    try:
        if table.count_rows() > _MOST_ROWS:
            return None
        found = run(lambda there: there.search().select(["id"]).with_row_id(True).to_arrow(), table)
    except LANCE_ERRORS:
        return None
    keys = _keys(found["id"].cast(pa.binary()))
    if keys is None:
        return None
    order = np.argsort(keys)
    return _Places(keys[order], found["_rowid"].to_numpy()[order])


def _keys(ids: pa.ChunkedArray) -> NDArray[np.uint64] | None:
    """A number for each id, seldom the same for two; None when they are not all of 32 bytes, or none."""
    try:
        fixed = ids.cast(pa.binary(32)).combine_chunks()
    except pa.ArrowInvalid:
        return None
    if not len(fixed):
        return None
    first = 4 * fixed.offset
    parts = np.frombuffer(fixed.buffers()[1], np.uint64)[first : first + 4 * len(fixed)]
    keys = np.zeros(len(fixed), np.uint64)
    for part in parts.reshape(-1, 4).T:
        keys = (keys ^ part) * _MIX
        keys ^= keys >> np.uint64(29)
    return keys
