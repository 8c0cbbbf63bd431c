"""The expert bank in LanceDB, with recently used experts kept decoded in memory.

One process writes at a time; the caller holds the lock. Which experts are live is the business of
whoever asks for them: the bank keeps rows by passage id and knows no snapshots.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import lancedb
import pyarrow as pa
from lancedb.index import BTree
from lancedb.query import LanceQueryBuilder
from lancedb.table import LanceTable

from knowstore.bank import fragments
from knowstore.bank.cache import CacheInfo, ExpertCache
from knowstore.bank.codec import check_codec
from knowstore.bank.expert import EncodedExpert, ExpertShape, StoredExpert
from knowstore.bank.places import RowIds
from knowstore.bank.rows import SCHEMA, from_arrow, to_arrow
from knowstore.config import BankConfig, Codec
from knowstore.errors import BankError, FingerprintError, KnowledgeStoreError
from knowstore.lance import LANCE_ERRORS, chunks, delete_history, read_back, run, write_without
from knowstore.records import well_formed

NAME = "experts"
"""The table that a store begins with."""

_WRITE_BYTES = 64 * 1024 * 1024  # encoded experts in one write
_READ_ROWS = 64  # rows in memory while the whole bank is read
_ID_INDEX_ROWS = 5_000  # below, a scan of the ids is as fast
_MOST_FILES = 128
_SMALL_FILE_BYTES = 16 * 1024 * 1024
_HISTORY = timedelta(hours=1)  # a reader whose version is gone reads again at the latest

_T = TypeVar("_T")


class ExpertBank:
    """The experts of one store: write, read, verify and remove them by passage id.

    Add some hundred experts at a time: every write makes a file and a version, and each is encoded
    and handed on in parts of at most 64 MiB, so that memory stays bounded.
    """

    def __init__(
        self,
        table: LanceTable,
        connection: lancedb.DBConnection,
        fingerprint: str | None,
        cache_bytes: int,
        *,
        is_fixed: bool = False,
    ) -> None:
        self._table, self._connection, self._is_fixed = table, connection, is_fixed
        self.fingerprint, self._cache_bytes = fingerprint, cache_bytes
        self._cache, self._row_ids = ExpertCache(cache_bytes), RowIds()

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        fingerprint: str | None,
        name: str = NAME,
        create: bool = False,
        cache_bytes: int = BankConfig.cache_bytes,
    ) -> Self:
        """Open the bank in a folder or at an object store's URI.

        Args:
            uri: where LanceDB keeps its tables.
            fingerprint: of the base model, layer and hypernetwork; written with every expert and required
                of every expert that is read. None reads any and writes none.
            name: of the bank's table; a store that changes over to another hypernetwork has two for a while.
            create: make the bank when there is none.
            cache_bytes: how many bytes of decoded experts stay in memory.

        Raises:
            BankError: no bank, or one that cannot be read.
        """
        try:
            if not create and "://" not in uri and not Path(uri).is_dir():
                raise _absent(uri)
            connection = lancedb.connect(uri)
            if name in connection.list_tables().tables:
                table = cast(LanceTable, connection.open_table(name))
            elif create:
                table = cast(LanceTable, connection.create_table(name, schema=SCHEMA))
            else:
                raise _absent(uri)
            if create and not table.schema.field("id").metadata:  # a kill may have come between
                table.set_unenforced_primary_key("id")
            missing = set(SCHEMA.names) - set(table.schema.names)
        except LANCE_ERRORS as error:
            raise BankError(
                f"the expert bank in {uri} cannot be read: {error}",
                kept="the files are as they were",
                fix="restore the folder from a backup, or ingest again into a new store",
            ) from error
        if missing:
            raise BankError(
                f"the experts table in {uri} has no column {', '.join(sorted(missing))}",
                kept="the table is as it was",
                fix="open the store with the version of knowstore that wrote it",
            )
        return cls(table, connection, fingerprint, cache_bytes)

    @classmethod
    def remake(cls, uri: str, *, fingerprint: str | None, name: str = NAME) -> Self:
        """An empty bank in the place of one that cannot be opened.

        Raises:
            BankError: what is there cannot be deleted.
        """
        try:
            connection = lancedb.connect(uri)
            if name in connection.list_tables().tables:
                connection.drop_table(name)
        except LANCE_ERRORS as error:
            raise BankError(
                f"the expert bank {name} in {uri} cannot be deleted: {error}",
                kept="its files, and every other bank",
                fix="look for missing permissions and run the command again",
            ) from error
        return cls.open(uri, fingerprint=fingerprint, name=name, create=True)

    @property
    def name(self) -> str:
        """The table's."""
        return str(self._table.name)

    @property
    def uri(self) -> str:
        """Where LanceDB keeps the table."""
        return str(self._connection.uri)

    @property
    def version(self) -> int:
        """LanceDB's version of the table that this object reads."""
        return int(self._table.version)

    def refresh(self) -> None:
        """See what other processes have written since; forgets decoded experts when there is anything.

        Raises:
            BankError: the bank cannot be read any more.
        """
        before = self.version
        self._read(lambda table: table.checkout_latest())  # type: ignore[no-untyped-call]
        if self.version != before:
            self._cache.clear()

    def latest(self) -> Self:
        """The bank as it is now, for reading: whatever is written, here or elsewhere, it holds the same experts until a
        purge has deleted them. It is this object when that holds the experts of now.

        Raises:
            BankError: the bank cannot be read any more.
        """
        try:
            newest = cast(LanceTable, self._connection.open_table(self.name))
            is_this = self._is_fixed and newest.version == self.version
        except LANCE_ERRORS as error:
            raise _unreadable(error) from error
        if is_this:
            return self
        return type(self)(newest, self._connection, self.fingerprint, self._cache_bytes, is_fixed=True)

    def at_version(self, version: int) -> Self:
        """The bank as it was in a version, for reading alone: another process sees by it what a fixed object of this
        one sees.

        Raises:
            BankError: there is no such version (any more): a purge deletes older ones.
        """
        try:
            table = cast(LanceTable, self._connection.open_table(self.name))
            table.checkout(version)
        except LANCE_ERRORS as error:
            raise _unreadable(error) from error
        return type(self)(table, self._connection, self.fingerprint, self._cache_bytes, is_fixed=True)

    # writing

    def add(self, experts: Iterable[StoredExpert], codec: Codec, batch_id: int) -> int:
        """Encode and write experts; one that is stored already is replaced.

        Args:
            experts: may be a generator; of several for one passage in a write, the last counts.
            codec: how their numbers are kept.
            batch_id: the edit batch that they belong to.

        Returns: how many experts were taken.

        Raises:
            BankError: no fingerprint to write, numbers that the codec cannot hold, or a failed write;
                parts of 64 MiB that were written before stay.
        """
        if self.fingerprint is None:
            raise BankError(
                "this bank was opened without a fingerprint, so its experts could not be told apart",
                kept="the bank is as it was",
                fix="open the bank with the fingerprint of the hypernetwork that makes the experts",
            )
        fingerprint = self.fingerprint
        return self._upsert(EncodedExpert.make(expert, codec, fingerprint, batch_id) for expert in experts)

    def add_encoded(self, experts: Iterable[EncodedExpert], batch_id: int) -> int:
        """Write experts of another bank as they are, after their checksums are verified.

        Args:
            experts: rows that `iter_encoded` gave.
            batch_id: the edit batch that they belong to from now on.

        Returns: how many experts were taken.

        Raises:
            ExpertChecksumError: bytes that are not what was written.
            FingerprintError: experts made for another model or hypernetwork than this bank's.
            BankError: a failed write; parts of 64 MiB that were written before stay.
        """

        def checked() -> Iterator[EncodedExpert]:
            for expert in experts:
                self._check_fingerprint(expert)
                expert.check()
                yield replace(expert, batch_id=batch_id)

        return self._upsert(checked())

    def commit_fragments(self, written: Sequence[str], ids: Collection[str]) -> None:
        """Make experts that `write_fragment` wrote, here or elsewhere, a part of the bank, all in one version.

        Args:
            written: descriptions that `write_fragment` gave.
            ids: passages whose experts they are; one that is stored already is replaced.

        Raises:
            BankError: a file that is not there, or a failed write; nothing was changed but for what is to be replaced.
            ConfigError: pylance is not installed.
        """
        self.delete(self._stored(ids))
        with self._writing() as table:
            fragments.commit(self.uri, self.name, written)
            table.checkout_latest()  # type: ignore[no-untyped-call]
        self._cache.drop(ids)

    def sweep(self) -> None:
        """Delete files of fragments that were written and never committed; nobody else may be writing."""
        with self._writing():
            fragments.sweep(self.uri, self.name)

    def delete(self, ids: Collection[str]) -> int:
        """Delete experts; their bytes stay in older versions until `purge`. Returns how many there were."""
        with self._writing() as table:
            n_before = table.count_rows()
            for chunk in chunks(ids):
                table.delete(_is_in(chunk))
            n_after = table.count_rows()
        self._cache.drop(ids)
        return n_before - n_after

    def clear(self) -> None:
        """Begin anew with an empty table, where files of it are torn or missing; older versions stay until `purge`."""
        with self._writing() as table:
            table.add(pa.table({name: [] for name in SCHEMA.names}, schema=SCHEMA), mode="overwrite")
        self._cache.clear()

    def purge(self, ids: Collection[str]) -> None:
        """Delete experts so that no file holds anything of them any more.

        Every remaining row is written again and all older versions are deleted. Readers in other
        processes go on with the version that is left. Interrupted, it can be run again with the same ids.

        Raises:
            BankError: a write failed, or an older version could not be deleted.
        """
        with self._writing() as table:
            has_index = bool(list(table.list_indices()))
            write_without(table, ids, _READ_ROWS)
            if has_index:
                _index_ids(table)
            delete_history(table, BankError)
        self._cache.drop(ids)

    def optimize(self) -> None:
        """Bring the index of ids up to date, and merge small files once there are many of them.

        Merging writes every expert again, so an edit of a few passages must not cause it. The old files stay for an
        hour, for those who read an older version.
        """
        with self._writing() as table:
            stats: Any = table.stats()  # a dict, whatever its annotation says
            n_files = stats["fragment_stats"]["num_fragments"]
            if n_files > _MOST_FILES and stats["total_bytes"] < n_files * _SMALL_FILE_BYTES:
                with read_back(table, [None]):
                    table.optimize(cleanup_older_than=_HISTORY)
            indices = list(table.list_indices())
            index = table.index_stats(indices[0].name) if indices else None
            n_unindexed = stats["num_rows"] if index is None else index.num_unindexed_rows
            if n_unindexed >= _ID_INDEX_ROWS:
                _index_ids(table)

    def rebuild_index(self) -> None:
        """Build the index of ids anew, where there is one."""
        with self._writing() as table:
            if list(table.list_indices()):
                _index_ids(table)

    def _upsert(self, experts: Iterator[EncodedExpert]) -> int:
        n_written = 0
        part: dict[str, EncodedExpert] = {}
        part_bytes = 0
        for expert in experts:
            part[expert.passage_id] = expert
            part_bytes += len(expert.data)
            if part_bytes >= _WRITE_BYTES:
                n_written += self._write_part(part)
                part, part_bytes = {}, 0
        return n_written + self._write_part(part)

    def _write_part(self, part: Mapping[str, EncodedExpert]) -> int:
        if not part:
            return 0
        is_any_stored = any(self._select(_is_in(chunk), ["id"]) for chunk in chunks(part))
        with self._writing() as table, read_back(table, map(_is_in, chunks(part))):
            if is_any_stored:
                merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
                merge.use_index(False).execute(to_arrow(part.values()))
            else:
                table.add(to_arrow(part.values()))
        self._cache.drop(part.keys())
        return len(part)

    # reading

    def get(self, ids: Sequence[str], *, allow_missing: bool = False) -> dict[str, StoredExpert]:
        """Experts by passage id, those that are not in memory in one read.

        Args:
            ids: passage ids.
            allow_missing: leave out those that are not stored.

        Returns: the experts in the order of `ids`; their tensors may be shared, do not write into them.

        Raises:
            BankError: an expert that is not stored, or a bank that cannot be read.
            ExpertChecksumError: bytes that are not what was written.
            FingerprintError: an expert made for another model or hypernetwork.
        """
        found = self._cache.get(ids)
        wanted = [passage_id for passage_id in dict.fromkeys(ids) if passage_id not in found]
        if wanted:
            for encoded in self._encoded(wanted):
                self._check_fingerprint(encoded)
                found[encoded.passage_id] = encoded.decode()
            self._cache.put(found[passage_id] for passage_id in wanted if passage_id in found)
        missing = [passage_id for passage_id in wanted if passage_id not in found]
        if missing and not allow_missing:
            raise BankError(
                f"{len(missing)} experts are not in the bank, {missing[0]} first",
                kept="the bank is as it was",
                fix="run `knowstore verify --repair`, or ingest their source again",
            )
        return {passage_id: found[passage_id] for passage_id in dict.fromkeys(ids) if passage_id in found}

    def existing(self, ids: Collection[str]) -> set[str]:
        """Those of `ids` that have an expert made for the bank's fingerprint."""
        made = "" if self.fingerprint is None else f" AND fingerprint = '{self.fingerprint}'"
        return {row["id"] for chunk in chunks(ids) for row in self._select(_is_in(chunk) + made, ["id"])}

    def ids_of_batch(self, batch_id: int) -> set[str]:
        """Passages whose expert an edit batch wrote."""
        return {row["id"] for row in self._select(f"batch = {int(batch_id)}", ["id"])}

    def ids(self) -> set[str]:
        """Passages that have an expert; no tensor is read."""
        return {row["id"] for row in self._select("true", ["id"])}

    def count(self) -> int:
        """Number of experts."""
        return int(self._read(LanceTable.count_rows))

    def size_bytes(self) -> int:
        """Bytes of the bank's data and index in its current version."""
        return int(self._read(LanceTable.stats)["total_bytes"])  # type: ignore[index]  # a dict, not what it is typed as

    def bytes_per_expert(self) -> float:
        """Mean bytes on disk of an expert, 0.0 for an empty bank."""
        n_experts = self.count()
        return self.size_bytes() / n_experts if n_experts else 0.0

    def forget(self) -> None:
        """Drop the decoded experts that are kept in memory."""
        self._cache.clear()

    def cache_info(self) -> CacheInfo:
        """What the memory of decoded experts holds, and its hits and misses since the bank was opened."""
        return self._cache.info()

    def iter_encoded(self, ids: Collection[str] | None = None) -> Iterator[EncodedExpert]:
        """Rows as they are stored, all when `ids` is None, a few at a time; nothing is verified.

        Raises:
            BankError: the bank cannot be read.
        """
        for condition in [None] if ids is None else map(_is_in, chunks(ids)):
            yield from self._scan_encoded(condition)

    def check(self, expert: EncodedExpert, shape: ExpertShape | None) -> None:
        """Refuse an expert that could not be used here; its checksum is not verified.

        Args:
            expert: a row of this bank or another.
            shape: what the experts look like that are made here; any when None.

        Raises:
            FingerprintError: it was made for another model or hypernetwork than this bank's.
            BankError: bytes that are no expert of finite numbers that has this shape.
        """
        self._check_fingerprint(expert)
        check_codec(expert.codec, expert.form)
        stored = expert.decode_unchecked()
        if shape is not None:
            shape.check(stored)

    def verify(
        self, ids: Collection[str] | None = None, shape: ExpertShape | None = None
    ) -> Iterator[tuple[str, KnowledgeStoreError]]:
        """Check experts one after another: stored once, checksum, and what `check` does.

        Args:
            ids: which experts, all when None; one that is not stored is a problem as well.
            shape: see `check`.

        Yields: passage id and the problem, for those that have one.

        Raises:
            BankError: the bank cannot be read on.
        """
        seen: set[str] = set()
        for expert in self.iter_encoded(ids):
            try:
                if expert.passage_id in seen:
                    raise _problem(f"the expert of passage {expert.passage_id} is stored twice")
                seen.add(expert.passage_id)
                expert.check()
                self.check(expert, shape)
            except BankError as problem:
                yield expert.passage_id, problem
        for passage_id in sorted(set(ids or ()) - seen):
            yield passage_id, _problem(f"passage {passage_id} has no expert")

    def index_problems(self, ids: Collection[str]) -> list[str]:
        """What the index of ids does not find of the experts there are; empty when it is sound.

        Args:
            ids: of all experts, as reading the whole bank gave them.

        Raises:
            BankError: the index cannot be read.
        """
        lost = set(ids) - self._stored(ids)
        return [f"the index of the bank does not find {len(lost)} experts, {min(lost)} first"] if lost else []

    # LanceDB

    def _stored(self, ids: Collection[str]) -> set[str]:
        return {row["id"] for chunk in chunks(ids) for row in self._select(_is_in(chunk), ["id"])}

    def _encoded(self, ids: Sequence[str]) -> list[EncodedExpert]:
        """The rows of ids, those that are stored: by their row ids where these are known, else by a condition."""
        rows = self._read(lambda table: self._row_ids.read(table, ids))
        if rows is None:
            rows = self._read(lambda table: _scan(table, _is_in(ids)).to_arrow())
        return [from_arrow(row) for row in rows.to_pylist()]

    def _check_fingerprint(self, expert: EncodedExpert) -> None:
        if self.fingerprint is not None and expert.fingerprint != self.fingerprint:
            raise FingerprintError(
                f"the expert of passage {expert.passage_id} was made for {expert.fingerprint}, "
                f"the configured model and hypernetwork are {self.fingerprint}",
                kept="the bank is as it was",
                fix="configure the hypernetwork that made the experts, or ingest again with the one configured now",
            )

    def _scan_encoded(self, condition: str | None) -> Iterator[EncodedExpert]:
        try:
            for batch in self._read(lambda table: _scan(table, condition).to_batches(_READ_ROWS)):
                yield from map(from_arrow, batch.to_pylist())
        except LANCE_ERRORS as error:
            raise _unreadable(error) from error

    def _select(self, condition: str, columns: list[str]) -> list[dict[str, Any]]:
        rows = self._read(lambda table: _scan(table, condition).select(columns).to_arrow())
        return cast(list[dict[str, Any]], rows.to_pylist())

    def _read(self, query: Callable[[LanceTable], _T]) -> _T:
        try:
            return run(query, self._table)
        except LANCE_ERRORS as error:
            if self._is_fixed:
                raise _unreadable(error) from error
            first_error, version = error, self._table.version
        try:  # a purge elsewhere deletes the files of the version that this object reads
            self._table.checkout_latest()  # type: ignore[no-untyped-call]
            if self._table.version == version:
                raise first_error
            self._cache.clear()
            return run(query, self._table)
        except LANCE_ERRORS as error:
            raise _unreadable(error) from error

    @contextmanager
    def _writing(self) -> Iterator[LanceTable]:
        try:
            yield self._table
        except LANCE_ERRORS as error:
            raise BankError(
                f"the expert bank could not be written: {error}",
                kept="experts that were written before",
                fix="look for a full disk or missing permissions and run the command again",
            ) from error


def bank_names(uri: str) -> list[str]:
    """The banks in a folder: the one that a store began with, and those of other hypernetworks."""
    names = lancedb.connect(uri).list_tables().tables
    return sorted(name for name in names if name == NAME or name.startswith(f"{NAME}_"))


def _index_ids(table: LanceTable) -> None:
    """Index the ids, again when that cannot be read: LanceDB may say that it is written when a file of it is not."""
    table.create_index("id", config=BTree(), replace=True)
    try:
        run(lambda indexed: _scan(indexed, "id = '0'").select(["id"]).to_arrow(), table)
    except LANCE_ERRORS:
        table.create_index("id", config=BTree(), replace=True)


def _is_in(ids: Iterable[str]) -> str:
    literals = ("'" + well_formed(passage_id).replace("'", "''") + "'" for passage_id in ids)
    return f"id IN ({', '.join(literals)})"


def _scan(table: LanceTable, condition: str | None) -> LanceQueryBuilder:
    return table.search() if condition is None else table.search().where(condition)


def _absent(uri: str) -> BankError:
    return BankError(
        f"there is no expert bank in {uri}",
        kept="nothing was made",
        fix="name the folder of an existing store, or ingest something to begin a new one",
    )


def _problem(what: str) -> BankError:
    return BankError(what, kept="the bank is as it was", fix="run `knowstore verify --repair`")


def _unreadable(error: Exception) -> BankError:
    return BankError(
        f"the expert bank could not be read: {error}",
        kept="the files are as they were",
        fix="run `knowstore verify`; restore the folder from a backup when the bank is damaged",
    )
