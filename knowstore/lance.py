"""What the tables in LanceDB have in common: the errors that it raises, conditions on many ids, rows that are written
anew, and old versions that are deleted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from lancedb.table import LanceTable

from knowstore.errors import KnowledgeStoreError

LANCE_ERRORS = (RuntimeError, ValueError, OSError, pa.ArrowException)
"""What LanceDB raises, by cause."""

_CHUNK = 2_000  # ids in one condition
_READ_ROWS = 64  # in memory while rows are read back
_TRIES = 5
_AGE = timedelta(milliseconds=1)  # of the versions that are deleted; LanceDB warns of less
_PATIENCE_S = 10.0  # with a clock that was set back a little

_T = TypeVar("_T")


def run(query: Callable[[LanceTable], _T], table: LanceTable) -> _T:
    """A query's result; a panic within LanceDB, as a damaged index causes it, becomes a RuntimeError."""
    try:
        return query(table)
    except Exception as error:
        if type(error).__name__ != "RustPanic":
            raise
        raise RuntimeError(f"LanceDB panicked: {error}") from error


def chunks(ids: Iterable[str]) -> Iterator[list[str]]:
    """The ids in lists short enough for one condition."""
    remaining = iter(ids)
    while chunk := list(islice(remaining, _CHUNK)):
        yield chunk


@contextmanager
def read_back(table: LanceTable, conditions: Iterable[str | None]) -> Iterator[None]:
    """Read the rows of all conditions once when the block that writes them has ended, for LanceDB can miss that a write
    failed.

    Raises:
        OSError: they cannot be read; the table is as it was before the block.
    """
    before = table.version
    yield
    try:
        for condition in conditions:
            run(partial(_read_all, condition), table)
    except LANCE_ERRORS as error:
        table.restore(before)
        raise OSError(f"what was written cannot be read: {error}") from error


def _read_all(condition: str | None, table: LanceTable) -> None:
    query = table.search()
    deque((query if condition is None else query.where(condition)).to_batches(_READ_ROWS), maxlen=0)


def write_without(table: LanceTable, ids: Collection[str], n_rows: int) -> None:
    """Write a new version of all rows but those of the ids, reading `n_rows` at a time.

    A deleted row would stay in its file until compaction finds enough of them there.

    Raises:
        OSError: as `read_back`.
    """
    left_out = pa.array(list(ids), pa.string())
    batches = table.search().to_batches(n_rows)
    kept = (batch.filter(pc.invert(pc.is_in(batch.column("id"), left_out))) for batch in batches)
    with read_back(table, [None]):
        table.add(pa.RecordBatchReader.from_batches(table.schema, kept), mode="overwrite")


def delete_history(table: LanceTable, error: type[KnowledgeStoreError]) -> None:
    """Delete every version but the newest.

    Raises:
        error: versions are left: others hold them, or they were dated by a clock that was set back since.
    """
    for _ in range(_TRIES):  # the first may itself write a version, by merging files or updating an index
        time.sleep(5 * _AGE.total_seconds())
        table.optimize(cleanup_older_than=_AGE, delete_unverified=True)
        versions = table.list_versions()
        if len(versions) == 1:
            return
        until: datetime = max(version["timestamp"] for version in versions)
        ahead_s = until.timestamp() - time.time()
        if 0 < ahead_s < _PATIENCE_S:
            time.sleep(ahead_s)
    what = f"the table {table.name} still has {len(versions)} versions, and older ones may hold what was purged"
    kept = "every row that was not purged"
    if ahead_s > 0:
        what += f": the clock was set back, and they are dated until {until.isoformat(' ', 'seconds')}"
        raise error(what, kept=kept, fix="purge again when the clock has passed that time")
    raise error(what, kept=kept, fix="end other programs that use this store and purge again")
