"""Whether the catalog can be read and agrees with itself: batches and purges with the placements, and settings with
what was recorded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from sqlalchemy import ColumnElement, Connection, Text, cast, delete, exists, func, insert, select, text, update

from knowstore.catalog.database import Database
from knowstore.catalog.placements import stretches
from knowstore.catalog.tables import BatchRow, FingerprintRow, PlacementRow, PurgeRow, SettingRow
from knowstore.catalog.values import bad_values

ROLES = ("llm", "retriever", "hypernetwork", "experts")
_COUNTS = ("n_added", "n_removed", "n_superseded")
Counts = tuple[int, int, int]
_UNREADABLE = object()


@dataclass(frozen=True)
class CatalogFault:
    """Something that the catalog contradicts itself in; `is_mendable` when `mend` can put it right."""

    kind: str
    detail: str
    is_mendable: bool = True


def faults(database: Database) -> list[CatalogFault]:
    """What is wrong with the catalog alone, without a look at the tables."""
    with database.read() as connection:
        found = [*_file_faults(database, connection)]
        if found:
            return found
        return [
            *(_state_fault(batch_id, state) for batch_id, state in _wrong_states(connection)),
            *_count_faults(connection),
            *_setting_faults(connection),
            *_unreadable_settings(connection),
            *_purge_faults(connection),
            *(CatalogFault("damaged catalog", detail, False) for detail in bad_values(connection)),
        ]


def mend(database: Database) -> None:
    """Put right what the placements and the recorded fingerprints determine; the caller is the one writer. A passage
    that was live after its purge was not purged."""
    with database.write() as connection:
        if database.is_sqlite:
            connection.execute(text("REINDEX"))
        for batch_id, _ in _wrong_states(connection):
            committed = func.coalesce(BatchRow.committed_at, BatchRow.created_at)
            connection.execute(
                update(BatchRow).where(BatchRow.id == batch_id).values(state="live", committed_at=committed)
            )
        for batch_id, (_, right) in _wrong_counts(connection).items():
            values = dict(zip(_COUNTS, right, strict=True))
            connection.execute(update(BatchRow).where(BatchRow.id == batch_id).values(**values))
        connection.execute(delete(PurgeRow).where(_was_live()))
        only = _only_recorded(connection)
        if list(_setting_faults(connection)) and only.keys() == set(ROLES):
            statement = database.insert(SettingRow).values(key="fingerprints", value=only)
            connection.execute(statement.on_conflict_do_update(index_elements=["key"], set_={"value": only}))


def place(database: Database, rows: list[tuple[str, str, int, int | None]]) -> None:
    """Write placements that were lost: (passage_id, source, added_batch, removed_batch)."""
    values = [
        {
            "passage_id": passage_id,
            "source": source,
            "added_batch": added,
            "removed_batch": removed,
            "reason": None if removed is None else "removed",
        }
        for passage_id, source, added, removed in rows
    ]
    if values:
        with database.write() as connection:
            connection.execute(insert(PlacementRow), values)


def _file_faults(database: Database, connection: Connection) -> Iterator[CatalogFault]:
    """What SQLite says of its own file."""
    if not database.is_sqlite:
        return
    for (line,) in connection.execute(text("PRAGMA integrity_check(10)")):
        if line != "ok":
            yield CatalogFault("damaged catalog", f"SQLite: {line}", "index" in line)
    for table, row, parent, _ in connection.execute(text("PRAGMA foreign_key_check")):
        yield CatalogFault("damaged catalog", f"row {row} of {table} refers to a row of {parent} that is lost", False)


def _wrong_states(connection: Connection) -> list[tuple[int, str]]:
    """Batches that have placements, which only a commit makes, and are not live."""
    is_placed = BatchRow.id.in_(select(PlacementRow.added_batch)) | BatchRow.id.in_(select(PlacementRow.removed_batch))
    rows = connection.execute(select(BatchRow.id, BatchRow.state).where(is_placed, BatchRow.state != "live"))
    return [(batch_id, state) for batch_id, state in rows]


def _state_fault(batch_id: int, state: str) -> CatalogFault:
    return CatalogFault("wrong batch state", f"edit batch {batch_id} was committed and is recorded as {state}")


def _count_faults(connection: Connection) -> Iterator[CatalogFault]:
    for batch_id, (recorded, right) in _wrong_counts(connection).items():
        said, found = ("/".join(map(str, counts)) for counts in (recorded, right))
        yield CatalogFault(
            "wrong counts",
            f"edit batch {batch_id} says {said} passages added/removed/superseded, its placements say {found}",
        )


def _wrong_counts(connection: Connection) -> dict[int, tuple[Counts, Counts]]:
    """Of batches whose counts are not what their placements come to: what is recorded, and what is right."""
    right = _counted(connection)
    rows = connection.execute(
        select(BatchRow.id, BatchRow.n_added, BatchRow.n_removed, BatchRow.n_superseded).where(BatchRow.state == "live")
    )
    recorded = {row.id: (row.n_added, row.n_removed, row.n_superseded) for row in rows}
    return {
        batch_id: (counts, right.get(batch_id, (0, 0, 0)))
        for batch_id, counts in recorded.items()
        if counts != right.get(batch_id, (0, 0, 0))
    }


def _counted(connection: Connection) -> dict[int, Counts]:
    """(added, removed, superseded) by batch: where stretches of liveness begin and end."""
    added: Counter[int] = Counter()
    removed: Counter[int] = Counter()
    superseded: Counter[int] = Counter()
    columns = (PlacementRow.passage_id, PlacementRow.added_batch, PlacementRow.removed_batch, PlacementRow.reason)
    rows = connection.execute(select(*columns).order_by(PlacementRow.passage_id, PlacementRow.added_batch))
    for _, group in groupby(rows, key=lambda row: row.passage_id):
        placed = list(group)
        reasons = {(row.removed_batch, row.reason) for row in placed}
        for start, end in stretches((row.added_batch, row.removed_batch) for row in placed):
            added[start] += 1
            if end is not None:
                removed[end] += 1
                superseded[end] += (end, "superseded") in reasons
    return {batch_id: (added[batch_id], removed[batch_id], superseded[batch_id]) for batch_id in {*added, *removed}}


def _setting_faults(connection: Connection) -> Iterator[CatalogFault]:
    if connection.execute(select(FingerprintRow.id)).first() is None:
        return
    value = _settings(connection)["fingerprints"]
    rows = connection.execute(select(FingerprintRow.kind, FingerprintRow.digest))
    known = {(kind, digest) for kind, digest in rows}
    is_right = isinstance(value, Mapping) and all((role, value.get(role)) in known for role in ROLES)
    if not is_right:
        yield CatalogFault(
            "damaged setting",
            "the setting `fingerprints` names models that were never recorded",
            _only_recorded(connection).keys() == set(ROLES),
        )


def _unreadable_settings(connection: Connection) -> Iterator[CatalogFault]:
    for key, value in _settings(connection).items():
        if value is _UNREADABLE and key != "fingerprints":  # of which `_setting_faults` tells
            yield CatalogFault("damaged setting", f"the setting `{key}` cannot be read", False)


def _settings(connection: Connection) -> dict[str, object]:
    """The settings by key."""
    found: dict[str, object] = {"fingerprints": None}
    for key, value in connection.execute(select(SettingRow.key, cast(SettingRow.value, Text))):
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = _UNREADABLE
    return found


def _purge_faults(connection: Connection) -> Iterator[CatalogFault]:
    for passage_id, batch_id in connection.execute(select(PurgeRow.passage_id, PurgeRow.batch_id).where(_was_live())):
        detail = f"passage {passage_id} is recorded as purged with edit batch {batch_id}, and was live after it"
        yield CatalogFault("wrong purge", detail)


def _was_live() -> ColumnElement[bool]:
    """Whether a passage was live right after the batch that it is said to have been purged with."""
    one = PlacementRow
    is_later = one.removed_batch.is_(None) | (one.removed_batch > PurgeRow.batch_id)
    return exists().where(one.passage_id == PurgeRow.passage_id, one.added_batch <= PurgeRow.batch_id, is_later)


def _only_recorded(connection: Connection) -> dict[str, str]:
    """Of each kind the fingerprint that was recorded, where there is one alone."""
    rows = connection.execute(select(FingerprintRow.kind, FingerprintRow.digest).order_by(FingerprintRow.kind))
    by_kind = {kind: list(group) for kind, group in groupby(rows, key=lambda row: row.kind)}
    return {kind: group[0].digest for kind, group in by_kind.items() if len(group) == 1}
