"""The catalog of edit batches: what decides which passages are live."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from sqlalchemy import Connection, Text, cast, exists, func, insert, or_, select, update

from knowstore.catalog import placements, schema, soundness
from knowstore.catalog.audits import AuditLog
from knowstore.catalog.database import Database
from knowstore.catalog.lock import writer_lock
from knowstore.catalog.placements import Change, Interval, Pair
from knowstore.catalog.soundness import CatalogFault
from knowstore.catalog.tables import BatchRow, FingerprintRow, PlacementRow, PurgeRow, SettingRow
from knowstore.config import ModelConfig
from knowstore.errors import CatalogError, ConfigError, UnknownBatchError
from knowstore.records import BatchKind, BatchState, EditBatch

MIGRATION_WAIT_S = 30.0


class Catalog:
    """Edit batches and placements in SQLite or PostgreSQL.

    A placement says that a passage is in the store from a source during an interval of batches.
    A change is staged with `stage`, and takes effect whole with `commit`; until then nobody sees
    it. Readers need no lock and never wait; whoever stages holds `writer`. Methods may be called
    from several threads.

        with Catalog.open("sqlite:///kb/catalog.db") as catalog, catalog.writer():
            batch = catalog.stage("ingest")
            catalog.commit(batch.id, Change(added=[(passage.passage_id, passage.source)]))
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.audits = AuditLog(database)

    # Opening and the schema

    @classmethod
    def open(cls, url: str | Path, *, migrate: bool = True) -> Catalog:
        """Open the catalog at a URL, `sqlite:///path` or `postgresql://user:password@host/database`.

        A `Path` means the SQLite file there, whatever characters its name has.
        With `migrate` a database without a catalog, or with one of an older version, is brought up
        to date first, which needs the writer lock. Without it the database must exist.

        Raises:
            ConfigError: the URL cannot be used, or psycopg is not installed.
            SchemaError: the catalog was written by a newer version; it was not touched.
            StoreLockedError: the schema is old and another process is writing.
            CatalogError: the database cannot be reached, or the file is not one.
        """
        database = Database(url)
        catalog = cls(database)
        try:
            if database.is_sqlite and not migrate and not database.path.exists():
                raise CatalogError(
                    f"there is no catalog at {database.name}",
                    kept="nothing was created",
                    fix="check the path, or create the store by ingesting into it",
                )
            if catalog.schema_current() != catalog.schema_head() and migrate:
                catalog.upgrade()
        except BaseException:
            catalog.close()
            raise
        return catalog

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def schema_current(self) -> str | None:
        """The database's schema revision, None when it holds no catalog yet."""
        return schema.current_revision(self._database)

    def schema_head(self) -> str:
        """The schema revision that this version of knowstore works with."""
        return schema.head_revision()

    def upgrade(self) -> None:
        """Bring the schema to `schema_head`, in one transaction.

        Raises:
            StoreLockedError: another process was writing for 30 seconds; nothing was changed.
        """
        with self.writer(timeout_s=MIGRATION_WAIT_S):
            schema.upgrade(self._database)

    def check(self) -> list[str]:
        """Differences between the tables there are and the tables there should be; empty when there are none."""
        return schema.differences(self._database)

    # Writing: one writer, one staged batch, one commit

    @contextmanager
    def writer(self, timeout_s: float = 0) -> Iterator[None]:
        """Be the store's one writer until the block ends; the lock of a dead process is free at once.

        Not reentrant: a second `writer` of the same process or thread is refused too.

        Raises:
            StoreLockedError: another writer is still there after `timeout_s` seconds; says who.
            SchemaError: a newer version has migrated the catalog since it was opened; it was not touched.
        """
        with writer_lock(self._database, timeout_s):
            schema.current_revision(self._database)
            yield

    def stage(
        self,
        kind: BatchKind,
        note: str = "",
        *,
        passages_version: int | None = None,
        experts_version: int | None = None,
    ) -> EditBatch:
        """Begin an edit batch; nobody sees it before `commit`. The versions are those of the tables before it.

        Raises:
            CatalogError: another batch is staged; nothing was changed.
        """
        with self._database.write() as connection:
            staged = _staged(connection)
            if staged is not None:
                raise CatalogError(
                    f"edit batch {staged.id} is staged already",
                    kept="the staged batch and everything live",
                    fix="commit or discard it first; opening the store does this after a crash",
                )
            row = connection.execute(
                insert(BatchRow)
                .values(
                    kind=kind,
                    state="staged",
                    created_at=datetime.now(UTC),
                    note=note,
                    n_added=0,
                    n_removed=0,
                    n_superseded=0,
                    passages_version_before=passages_version,
                    experts_version_before=experts_version,
                )
                .returning(BatchRow.id)
            )
            return _batch(connection, row.scalar_one())

    def staged(self) -> EditBatch | None:
        """The batch that was staged and neither committed nor discarded, if any."""
        with self._database.read() as connection:
            return _staged(connection)

    def discard(self, batch_id: int) -> None:
        """Give up a staged batch.

        Raises:
            UnknownBatchError: there is no such batch.
            CatalogError: it is not staged; nothing was changed.
        """
        with self._database.write() as connection:
            _check_staged(connection, batch_id)
            connection.execute(update(BatchRow).where(BatchRow.id == batch_id).values(state="discarded"))

    def effects(self, change: Change) -> tuple[set[str], set[str]]:
        """Passage ids that a change would make live, and those that it would end."""
        with self._database.read() as connection:
            plan = placements.plan(self._database, connection, change)
        return plan.becoming_live, plan.no_longer_live

    def commit(
        self,
        batch_id: int,
        change: Change,
        *,
        passages_version: int | None = None,
        experts_version: int | None = None,
        settings: Mapping[str, object] | None = None,
        note: str | None = None,
    ) -> EditBatch:
        """Apply a change, make its staged batch live and set `settings`, in one transaction.

        The versions are those of the tables after it. `note` takes the place of what was noted when the batch was
        staged, maybe by an ingest of other files that this one goes on with. The counts of the batch that comes back
        are of passages whose liveness changed.

        Raises:
            UnknownBatchError: there is no such batch.
            CatalogError: it is not staged, or the database failed; the batch is as it was.
        """
        with self._database.write() as connection:
            batch = _check_staged(connection, batch_id)
            plan = placements.plan(self._database, connection, change)
            placements.apply(self._database, connection, plan, batch_id, is_rollback=batch.kind == "rollback")
            connection.execute(
                update(BatchRow)
                .where(BatchRow.id == batch_id)
                .values(
                    state="live",
                    note=batch.note if note is None else note,
                    committed_at=datetime.now(UTC),
                    n_added=len(plan.becoming_live),
                    n_removed=len(plan.no_longer_live),
                    n_superseded=len(plan.superseded),
                    passages_version_after=passages_version,
                    experts_version_after=experts_version,
                )
            )
            self._set(connection, settings or {})
            return _batch(connection, batch_id)

    # What is live

    def head(self) -> int:
        """The snapshot that readers use: the id of the latest live batch, 0 when there is none."""
        with self._database.read() as connection:
            return connection.scalar(select(func.max(BatchRow.id)).where(BatchRow.state == "live")) or 0

    def live_ids(self, among: Collection[str] | None = None) -> set[str]:
        """The live passages, or those of `among` that are live."""
        with self._database.read() as connection:
            return placements.live_ids(self._database, connection, among)

    def live_placements(self, *, source: str | None = None, passage_ids: Collection[str] | None = None) -> list[Pair]:
        """Live pairs (passage_id, source) in the order they were added, of one source or some passages if given."""
        with self._database.read() as connection:
            return placements.live_pairs(self._database, connection, source=source, passage_ids=passage_ids)

    def count_live(self) -> int:
        """The number of live passages."""
        with self._database.read() as connection:
            return placements.count_live(connection)

    def first_batch(self, passage_ids: Collection[str]) -> dict[str, int]:
        """The batch since which each passage is live without a break; passages that are not live are left out."""
        with self._database.read() as connection:
            stretches = placements.intervals(self._database, connection, passage_ids)
            return {passage_id: live_from for passage_id, live_from, live_to in stretches if live_to is None}

    def sources(self) -> list[tuple[str, int]]:
        """Sources by name, each with its number of live passages."""
        with self._database.read() as connection:
            return placements.counts_by_source(connection)

    def intervals(self, among: Collection[str] | None = None) -> Iterator[Interval]:
        """For each passage ever placed, or each of those `among`, the last stretch of batches (passage_id, live_from,
        live_to) in which it was live without a break; `live_to` is None while it is live."""
        with self._database.read() as connection:
            yield from placements.intervals(self._database, connection, among)

    def introduced(self, passage_ids: Collection[str], *, at: int) -> dict[str, int]:
        """For each passage the latest batch up to `at` that added it, not counting rollbacks, which bring back."""
        with self._database.read() as connection:
            return placements.introduced(self._database, connection, passage_ids, at)

    def shared(self, source: str, *, at: int) -> set[str]:
        """Passages that a source (a prefix when it ends in `*`) places at snapshot `at` and another source too."""
        with self._database.read() as connection:
            return placements.shared(connection, source, at)

    # History

    def batches(self, limit: int | None = None, offset: int = 0) -> list[EditBatch]:
        """Edit batches in every state, newest first."""
        with self._database.read() as connection:
            return _batches(connection, limit=limit, offset=offset)

    def batch(self, batch_id: int) -> EditBatch:
        """One edit batch, in any state.

        Raises:
            UnknownBatchError: there is none.
        """
        with self._database.read() as connection:
            return _batch(connection, batch_id)

    def versions(self, batch_id: int) -> dict[str, int | None]:
        """The table versions recorded with a batch: `passages_before`, `passages_after`, `experts_before`,
        `experts_after`.

        Raises:
            UnknownBatchError: there is no such batch.
        """
        with self._database.read() as connection:
            _batch(connection, batch_id)
            row = connection.execute(
                select(
                    BatchRow.passages_version_before,
                    BatchRow.passages_version_after,
                    BatchRow.experts_version_before,
                    BatchRow.experts_version_after,
                ).where(BatchRow.id == batch_id)
            ).one()
        return {name.replace("_version", ""): version for name, version in row._asdict().items()}

    def batch_items(self, batch_id: int) -> dict[str, list[Pair]]:
        """The pairs (passage_id, source) that a batch `added`, `removed` and `superseded`.

        Raises:
            UnknownBatchError: there is no such batch.
        """
        with self._database.read() as connection:
            _batch(connection, batch_id)
            return {name: list(pairs) for name, pairs in asdict(placements.pairs_of(connection, batch_id)).items()}

    def check_live(self, batch_id: int) -> None:
        """Refuse what is no live batch.

        Raises:
            UnknownBatchError: no live batch has this id.
        """
        with self._database.read() as connection:
            _check_live(connection, batch_id)

    def placements_at(self, batch_id: int) -> set[Pair]:
        """The pairs (passage_id, source) that were live right after a live batch; batch 0 is the empty store.

        Raises:
            UnknownBatchError: no live batch has this id.
        """
        with self._database.read() as connection:
            if batch_id:
                _check_live(connection, batch_id)
            return placements.pairs_at(connection, batch_id)

    def rollback_change(self, batch_id: int) -> Change:
        """The change that restores exactly what was live before a batch, undoing it and every later one.

        Passages whose bytes were purged are listed like any other; ask `purged` before committing it.

        Raises:
            UnknownBatchError: no live batch has this id.
        """
        with self._database.read() as connection:
            _check_live(connection, batch_id)
            return placements.change_back(connection, batch_id)

    def record_purge(self, batch_id: int, passage_ids: Collection[str]) -> None:
        """Note that the bytes of these passages were physically removed with a batch."""
        if not passage_ids:
            return
        rows = [{"passage_id": passage_id, "batch_id": batch_id} for passage_id in set(passage_ids)]
        with self._database.write() as connection:
            _batch(connection, batch_id)
            connection.execute(self._database.insert(PurgeRow).on_conflict_do_nothing(), rows)

    def purged(self, among: Collection[str]) -> set[str]:
        """The passages of `among` whose bytes were purged and that have not been live since."""
        is_later = or_(PlacementRow.removed_batch.is_(None), PlacementRow.removed_batch > PurgeRow.batch_id)
        lived_on = exists().where(PlacementRow.passage_id == PurgeRow.passage_id, is_later)
        chosen = self._database.among(PurgeRow.passage_id, among)
        with self._database.read() as connection:
            return set(connection.scalars(select(PurgeRow.passage_id).where(chosen, ~lived_on)))

    # Soundness

    def faults(self) -> list[CatalogFault]:
        """What of the catalog cannot be read, and what it contradicts itself in: its file, the values of its rows,
        states and counts of batches, purges, the recorded models."""
        with self._database.translated_errors():
            return soundness.faults(self._database)

    def mend(self) -> None:
        """Put right those faults that the rest of the catalog determines; the caller holds `writer`."""
        soundness.mend(self._database)

    def place(self, rows: list[tuple[str, str, int, int | None]]) -> None:
        """Write placements that were lost, as (passage_id, source, added_batch, removed_batch); for repair."""
        soundness.place(self._database, rows)

    def live_batches(self) -> set[int]:
        """The ids of all batches that were committed."""
        with self._database.read() as connection:
            return set(connection.scalars(select(BatchRow.id).where(BatchRow.state == "live")))

    def placed_sources(self) -> dict[str, set[str]]:
        """For each passage ever placed the sources that it was in the store from."""
        with self._database.read() as connection:
            return placements.sources_by_passage(connection)

    # Settings and fingerprints

    def setting(self, key: str, default: object = None) -> object:
        """The JSON value stored under a key, or the default.

        Raises:
            CatalogError: the setting is damaged.
        """
        with self._database.read() as connection:
            row = connection.execute(select(cast(SettingRow.value, Text)).where(SettingRow.key == key)).first()
        try:
            return default if row is None else json.loads(row[0])
        except ValueError as error:
            raise _damaged_setting(key, error) from error

    def models(self) -> ModelConfig:
        """The models that the store was made with; the default ones while it is empty.

        Raises:
            CatalogError: the setting is damaged.
        """
        recorded = self.setting("models")
        try:
            return ModelConfig() if recorded is None else ModelConfig(**recorded)  # type: ignore[arg-type]
        except (TypeError, ConfigError) as error:
            raise _damaged_setting("models", error) from error

    def set_setting(self, key: str, value: object) -> None:
        """Store a JSON value under a key, in place of an older one."""
        self.set_settings({key: value})

    def settle(self, key: str, value: object) -> object:
        """Store a JSON value under a key that has none; gives the value that is there then, of whoever was first."""
        with self._database.write() as connection:
            row = {"key": key, "value": value}
            connection.execute(self._database.insert(SettingRow).values(row).on_conflict_do_nothing())
            found: object = connection.scalar(select(SettingRow.value).where(SettingRow.key == key))
        return found

    def set_settings(self, values: Mapping[str, object]) -> None:
        """Store JSON values under several keys, all or none of them."""
        with self._database.write() as connection:
            self._set(connection, values)

    def _set(self, connection: Connection, values: Mapping[str, object]) -> None:
        for key, value in values.items():
            statement = self._database.insert(SettingRow).values(key=key, value=value)
            connection.execute(statement.on_conflict_do_update(index_elements=["key"], set_={"value": value}))

    def fingerprint(self, kind: str, digest: str, detail: dict[str, object]) -> None:
        """Record what made rows of this store; a digest that is known already is left as it is."""
        row = {"kind": kind, "digest": digest, "detail": detail, "created_at": datetime.now(UTC)}
        with self._database.write() as connection:
            connection.execute(self._database.insert(FingerprintRow).values(row).on_conflict_do_nothing())

    def fingerprints(self) -> list[dict[str, object]]:
        """Recorded fingerprints, oldest first: `kind`, `digest`, `detail`, `created_at`."""
        columns = (FingerprintRow.kind, FingerprintRow.digest, FingerprintRow.detail, FingerprintRow.created_at)
        with self._database.read() as connection:
            return [row._asdict() for row in connection.execute(select(*columns).order_by(FingerprintRow.id))]


def _batches(
    connection: Connection, *, state: BatchState | None = None, limit: int | None = None, offset: int = 0
) -> list[EditBatch]:
    statement = select(*_RECORD).order_by(BatchRow.id.desc()).limit(limit).offset(offset)
    if state is not None:
        statement = statement.where(BatchRow.state == state)
    return [EditBatch(**row._asdict()) for row in connection.execute(statement)]


_RECORD = (
    BatchRow.id,
    BatchRow.kind,
    BatchRow.state,
    BatchRow.created_at,
    BatchRow.committed_at,
    BatchRow.note,
    BatchRow.n_added,
    BatchRow.n_removed,
    BatchRow.n_superseded,
)


def _staged(connection: Connection) -> EditBatch | None:
    batches = _batches(connection, state="staged")
    return batches[0] if batches else None


def _batch(connection: Connection, batch_id: int) -> EditBatch:
    is_possible = 0 < batch_id < 2**31  # what the column holds
    row = connection.execute(select(*_RECORD).where(BatchRow.id == batch_id)).first() if is_possible else None
    if row is None:
        raise _unknown(f"there is no edit batch {batch_id}")
    return EditBatch(**row._asdict())


def _check_live(connection: Connection, batch_id: int) -> None:
    state = _batch(connection, batch_id).state
    if state != "live":
        raise _unknown(f"edit batch {batch_id} is {state}, so it never changed anything")


def _check_staged(connection: Connection, batch_id: int) -> EditBatch:
    batch = _batch(connection, batch_id)
    state = connection.scalar(select(BatchRow.state).where(BatchRow.id == batch_id).with_for_update())
    if state != "staged":
        raise CatalogError(
            f"edit batch {batch_id} is {state}, not staged",
            kept="the catalog is as it was before this call",
            fix="stage a new batch and commit that one",
        )
    return batch


def _damaged_setting(key: str, error: Exception) -> CatalogError:
    ways_out = {
        "models": "name every model (--llm, --retriever, --reranker, --hypernetwork), or restore the catalog",
        "fingerprints": "run `knowstore verify --repair`, or restore the catalog from a backup",
    }
    return CatalogError(
        f"the catalog's setting `{key}` cannot be read: {error}",
        kept="the store is as it was",
        fix=ways_out.get(key, "restore the catalog from a backup"),
    )


def _unknown(what: str) -> UnknownBatchError:
    return UnknownBatchError(what, kept="nothing was changed", fix="run `knowstore batches` to see the ids there are")
