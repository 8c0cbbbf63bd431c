"""Which passage is live from which source, and how a change moves it; every function takes an open transaction.

A passage is live while at least one source places it. Visible at snapshot T means
`added_batch <= T` and (`removed_batch` is null or `removed_batch > T`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from sqlalchemy import ColumnElement, Connection, and_, func, insert, or_, select, true, update
from sqlalchemy.orm import aliased

from knowstore.catalog.database import Database
from knowstore.catalog.tables import BatchRow, PlacementRow

Pair = tuple[str, str]
Interval = tuple[str, int, int | None]

_PAIR = (PlacementRow.passage_id, PlacementRow.source)
_LIVE = PlacementRow.removed_batch.is_(None)
_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Change:
    """Placements that appear and go, each a pair (passage_id, source).

    What is live after it is (live before - removed - superseded) + added: a pair that is both
    added and removed stays. `superseded` are removals because a newer version of the source
    replaced the passage.
    """

    added: Sequence[Pair] = ()
    removed: Sequence[Pair] = ()
    superseded: Sequence[Pair] = ()


@dataclass(frozen=True)
class Plan:
    """What a change does to the placements there are: rows to insert, rows to close by reason, and the
    passages that become live, that are live no longer, and the part of these that was superseded."""

    inserts: list[Pair]
    closes: dict[str, list[int]]
    becoming_live: set[str]
    no_longer_live: set[str]
    superseded: set[str]


def plan(database: Database, connection: Connection, change: Change) -> Plan:
    """Compare a change with what is live; a pair that is added but live, or removed but not live, is ignored."""
    added = dict.fromkeys(change.added)
    gone = {**dict.fromkeys(change.superseded, "superseded"), **dict.fromkeys(change.removed, "removed")}
    gone = {pair: reason for pair, reason in gone.items() if pair not in added}
    live = _live_rows(database, connection, {passage_id for pair in (added, gone) for passage_id, _ in pair})

    closes: dict[str, list[int]] = {}
    for pair, reason in gone.items():
        if pair in live:
            closes.setdefault(reason, []).append(live[pair])
    before = {passage_id for passage_id, _ in live}
    after = {passage_id for passage_id, _ in added} | {
        passage_id for passage_id, s in live if (passage_id, s) not in gone
    }
    superseded = {pair[0] for pair, reason in gone.items() if pair in live and reason == "superseded"}
    return Plan(
        inserts=[pair for pair in added if pair not in live],
        closes=closes,
        becoming_live=after - before,
        no_longer_live=before - after,
        superseded=superseded - after,
    )


def apply(database: Database, connection: Connection, plan: Plan, batch_id: int, *, is_rollback: bool) -> None:
    """Write a plan as the placements' part of an edit batch."""
    for reason, ids in plan.closes.items():
        connection.execute(
            update(PlacementRow)
            .where(database.among(PlacementRow.id, ids))
            .values(removed_batch=batch_id, reason="rolled_back" if is_rollback else reason)
        )
    if plan.inserts:
        rows = [{"passage_id": passage_id, "source": source} for passage_id, source in plan.inserts]
        connection.execute(insert(PlacementRow).values(added_batch=batch_id), rows)


def _live_rows(database: Database, connection: Connection, passage_ids: Collection[str]) -> dict[Pair, int]:
    chosen = database.among(PlacementRow.passage_id, passage_ids)
    rows = connection.execute(select(*_PAIR, PlacementRow.id).where(_LIVE, chosen))
    return {(passage_id, source): id_ for passage_id, source, id_ in rows}


def live_pairs(
    database: Database, connection: Connection, *, source: str | None, passage_ids: Collection[str] | None
) -> list[Pair]:
    """Live placements in the order they were made, of one source or all, of some passages or all."""
    by_source = true() if source is None else PlacementRow.source == source
    chosen = _chosen(database, passage_ids)
    rows = connection.execute(select(*_PAIR).where(_LIVE, by_source, chosen).order_by(PlacementRow.id))
    return [(passage_id, source) for passage_id, source in rows]


def live_ids(database: Database, connection: Connection, among: Collection[str] | None) -> set[str]:
    """Ids of live passages, of all or of those `among`."""
    rows = connection.scalars(select(PlacementRow.passage_id).where(_LIVE, _chosen(database, among)).distinct())
    return set(rows)


def introduced(database: Database, connection: Connection, among: Collection[str], at: int) -> dict[str, int]:
    """The latest batch up to `at` that added each passage; a rollback adds nothing, it brings back."""
    rows = connection.execute(
        select(PlacementRow.passage_id, func.max(PlacementRow.added_batch).label("batch_id"))
        .join(BatchRow, BatchRow.id == PlacementRow.added_batch)
        .where(database.among(PlacementRow.passage_id, among), BatchRow.kind != "rollback", BatchRow.id <= at)
        .group_by(PlacementRow.passage_id)
    )
    return {row.passage_id: row.batch_id for row in rows}


def pairs_at(connection: Connection, batch_id: int) -> set[Pair]:
    """The placements visible at snapshot `batch_id`."""
    since = PlacementRow.added_batch <= batch_id
    until = or_(_LIVE, PlacementRow.removed_batch > batch_id)
    return {(passage_id, source) for passage_id, source in connection.execute(select(*_PAIR).where(since, until))}


def shared(connection: Connection, source: str, at: int) -> set[str]:
    """Passages that a source places at snapshot `at` and another source too; `source` is a prefix when it ends in
    `*`."""
    one, other = aliased(PlacementRow), aliased(PlacementRow)
    name = source.removesuffix("*")
    is_named = func.substr(one.source, 1, len(name)) == name if source.endswith("*") else one.source == source
    rows = connection.scalars(
        select(one.passage_id)
        .join(other, and_(other.passage_id == one.passage_id, other.source != one.source))
        .where(is_named, *(row.added_batch <= at for row in (one, other)))
        .where(*(or_(row.removed_batch.is_(None), row.removed_batch > at) for row in (one, other)))
        .distinct()
    )
    return set(rows)


def change_back(connection: Connection, batch_id: int) -> Change:
    """The change from what is live now to what was live just before `batch_id`."""
    newer = and_(_LIVE, PlacementRow.added_batch >= batch_id)
    ended = and_(PlacementRow.added_batch < batch_id, PlacementRow.removed_batch >= batch_id)
    now: set[Pair] = set()
    then: set[Pair] = set()
    for passage_id, source, removed_batch in connection.execute(
        select(*_PAIR, PlacementRow.removed_batch).where(or_(newer, ended))
    ):
        (now if removed_batch is None else then).add((passage_id, source))
    return Change(added=sorted(then - now), removed=sorted(now - then))


def pairs_of(connection: Connection, batch_id: int) -> Change:
    """What a committed edit batch did; a rollback's removals are among `removed`."""
    added: list[Pair] = []
    removed: list[Pair] = []
    superseded: list[Pair] = []
    rows = connection.execute(
        select(*_PAIR, PlacementRow.added_batch, PlacementRow.reason)
        .where(or_(PlacementRow.added_batch == batch_id, PlacementRow.removed_batch == batch_id))
        .order_by(PlacementRow.id)
    )
    for passage_id, source, added_batch, reason in rows:
        if added_batch == batch_id:
            added.append((passage_id, source))
        else:
            (superseded if reason == "superseded" else removed).append((passage_id, source))
    return Change(added, removed, superseded)


def intervals(
    database: Database, connection: Connection, passage_ids: Collection[str] | None = None
) -> Iterator[Interval]:
    """The last stretch (passage_id, live_from, live_to) in which each passage was live without a break."""
    rows = connection.execution_options(yield_per=_ROWS_AT_ONCE).execute(
        select(PlacementRow.passage_id, PlacementRow.added_batch, PlacementRow.removed_batch)
        .where(_chosen(database, passage_ids))
        .order_by(PlacementRow.passage_id, PlacementRow.added_batch)
    )
    for passage_id, group in groupby(rows, key=lambda row: row.passage_id):
        *_, last = stretches((row.added_batch, row.removed_batch) for row in group)
        yield passage_id, *last


def stretches(placements: Iterable[tuple[int, int | None]]) -> Iterator[tuple[int, int | None]]:
    """From which batch to which a passage was live without a break: placements (added, removed), ordered by their
    start, joined where they overlap or touch."""
    start, end = 0, 0
    for added, removed in placements:
        if added > end:
            if end:
                yield start, end
            start, end = added, added
        if removed is None:
            yield start, None
            return
        end = max(end, removed)
    if end:
        yield start, end


def sources_by_passage(connection: Connection) -> dict[str, set[str]]:
    """The sources that ever placed each passage."""
    sources: dict[str, set[str]] = {}
    for passage_id, source in connection.execute(select(*_PAIR).distinct()):
        sources.setdefault(passage_id, set()).add(source)
    return sources


def counts_by_source(connection: Connection) -> list[tuple[str, int]]:
    """Each source with its number of live placements, by name."""
    rows = connection.execute(
        select(PlacementRow.source, func.count())
        .where(_LIVE)
        .group_by(PlacementRow.source)
        .order_by(PlacementRow.source)
    )
    return [(source, count) for source, count in rows]


def count_live(connection: Connection) -> int:
    """How many passages are live."""
    return connection.scalar(select(func.count(PlacementRow.passage_id.distinct())).where(_LIVE)) or 0


def _chosen(database: Database, passage_ids: Collection[str] | None) -> ColumnElement[bool]:
    return true() if passage_ids is None else database.among(PlacementRow.passage_id, passage_ids)
