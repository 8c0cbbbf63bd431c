"""The passages table in LanceDB.

Every row says from which edit batch (`live_from`) to which (`live_to`) it is visible. A reader gives
the latest edit batch that the catalog has committed and sees the rows of that snapshot; rows and
removals of a batch that is still staged carry a higher id and stay invisible, so one commit in the
catalog makes all of them visible, and `discard` takes them back.

One process writes at a time; the caller holds the lock. Readers never wait.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import FTS, BTree, IvfFlat
from lancedb.query import FullTextOperator, MultiMatchQuery
from lancedb.table import LanceTable

from knowstore.config import Filters
from knowstore.errors import PassageError
from knowstore.lance import LANCE_ERRORS, chunks, delete_history, read_back, run, write_without
from knowstore.passages.filters import is_in, where
from knowstore.passages.rows import (
    LIVE,
    Candidate,
    Floats,
    PassageRow,
    StoredRow,
    make_schema,
    to_arrow,
    to_candidate,
    to_stored,
)
from knowstore.passages.soundness import ExaminedRow, examined_rows

_NAME = "passages"
_TEXT_COLUMNS = ["text", "title"]
_CANDIDATE_COLUMNS = ["id", "text", "title", "source", "date", "vector", "segments", "segment_vectors", "live_from"]
_TIE = 1e-5  # scores this close may be ordered either way by LanceDB, which computes in float32
_READ_ROWS = 1_024  # rows in memory while the whole table is read
_RANK_OFFSET = 60  # of reciprocal rank fusion (Cormack et al., 2009)
_MIN_POOL = 50  # ranks of each list that hybrid search fuses
_ID_INDEX_ROWS = 5_000  # below, a scan of the ids is as fast
_STALE = 0.25  # share of the rows that an index may lack; LanceDB scans these
_STALE_TEXT = 0.01  # a scan of text is slow, and weighs words a little otherwise than the index
_MOST_FILES = 32  # a search of as many takes hardly longer
_HISTORY = timedelta(hours=1)  # a reader whose version is gone reads again at the latest
_PROBED_ROWS = 200  # passages by which the indexes of text and of vectors are tried
# letters between blanks: what is joined to them is one word with them
_WORD = re.compile(r"(?<!\S)[A-Za-z]{4,30}(?!\S)")
_PROBES = 32  # partitions of an ANN index that a query visits

_T = TypeVar("_T")


class PassageTable:
    """Passages of one store: write, remove, look up and search them.

    In every method `at` is the latest committed edit batch of the snapshot to read; None means
    every stored row, whether staged, live or removed.
    """

    ann_rows = 100_000
    """From this many rows on, `optimize` keeps an approximate (IVF) index; below, search is exact."""

    def __init__(self, table: LanceTable, connection: lancedb.DBConnection, *, is_fixed: bool = False) -> None:
        self._table, self._connection, self._is_fixed = table, connection, is_fixed

    @classmethod
    def open(cls, uri: str, *, dim: int | None = None, create: bool = False) -> Self:
        """Open the table in a folder or at an object store's URI.

        Args:
            uri: where LanceDB keeps its tables.
            dim: embedding width E; needed to create the table, checked against it otherwise.
            create: make the table when there is none.

        Raises:
            PassageError: no table, one that cannot be read, or one of another embedding width.
        """
        try:
            if not create and "://" not in uri and not Path(uri).is_dir():
                raise _absent(uri)
            connection = lancedb.connect(uri)
            if _NAME not in connection.list_tables().tables:
                if not create or dim is None:
                    raise _absent(uri)
                return cls(_create(connection, dim), connection)
            table = cast(LanceTable, connection.open_table(_NAME))
            found = table.schema.field("vector").type.list_size
        except (*LANCE_ERRORS, KeyError) as error:
            raise PassageError(
                f"the passages table in {uri} cannot be read: {error}",
                kept="the files are as they were",
                fix="restore the folder from a backup, or ingest again into a new store",
            ) from error
        if dim is not None and dim != found:
            raise PassageError(
                f"the passages table in {uri} holds embeddings of width {found}, the retriever makes {dim}",
                kept="the table is as it was",
                fix="use the retriever that the store was made with, or ingest again into a new store",
            )
        return cls(table, connection)

    @property
    def dim(self) -> int:
        """Embedding width E."""
        return int(self._table.schema.field("vector").type.list_size)

    @property
    def version(self) -> int:
        """LanceDB's version of the table that this object reads."""
        return int(self._table.version)

    def refresh(self) -> None:
        """See what other processes have written since.

        Raises:
            PassageError: the table cannot be read any more.
        """
        self._read(LanceTable.checkout_latest)

    def latest(self) -> Self:
        """The table as it is now, for reading: whatever is written, here or elsewhere, it shows the same rows until a
        purge has deleted them. It is this object when that shows the table as it is now.

        Raises:
            PassageError: the table cannot be read any more.
        """
        try:
            newest = cast(LanceTable, self._connection.open_table(_NAME))
            is_this = self._is_fixed and newest.version == self.version
        except LANCE_ERRORS as error:
            raise _unreadable(error) from error
        return self if is_this else type(self)(newest, self._connection, is_fixed=True)

    def at_version(self, version: int) -> Self:
        """The table as it was in a version, for reading alone: another process sees by it what a fixed object of this
        one sees.

        Raises:
            PassageError: there is no such version (any more): a purge deletes older ones.
        """
        try:
            table = cast(LanceTable, self._connection.open_table(_NAME))
            table.checkout(version)
        except LANCE_ERRORS as error:
            raise _unreadable(error) from error
        return type(self)(table, self._connection, is_fixed=True)

    # writing

    def add(self, rows: Sequence[PassageRow], batch_id: int) -> int:
        """Stage passages in an edit batch; an id that is stored already is revived instead.

        Args:
            rows: passages with their embeddings; of several with one id, the first counts.
            batch_id: the staged edit batch.

        Returns: how many rows are new.

        Raises:
            PassageError: a row that does not fit the table, or a failed write; nothing of this call is kept.
        """
        by_id: dict[str, PassageRow] = {}
        for row in rows:
            by_id.setdefault(row.passage.passage_id, row)
        known = self.existing(by_id)
        new = [row for passage_id, row in by_id.items() if passage_id not in known]
        if new:
            ids = [row.passage.passage_id for row in new]
            with self._writing() as table, read_back(table, (is_in("id", chunk) for chunk in chunks(ids))):
                table.add(to_arrow(new, batch_id, table.schema))
        self.revive(known, batch_id)
        return len(new)

    def revive(self, ids: Collection[str], batch_id: int) -> int:
        """Stage the return of removed passages; what the same batch removed is simply kept.

        Returns: how many rows changed; one that is live stays as it is.
        """
        kept = self._update(ids, f"live_to = {int(batch_id)} AND live_from < {int(batch_id)}", {"live_to": LIVE})
        return kept + self._update(ids, f"live_to < {LIVE}", {"live_from": int(batch_id), "live_to": LIVE})

    def retire(self, ids: Collection[str], batch_id: int) -> int:
        """Stage the removal of passages; their rows stay until `purge`.

        Returns: how many rows changed; one that is removed already stays as it is.
        """
        return self._update(ids, f"live_to = {LIVE}", {"live_to": int(batch_id)})

    def set_source(self, passage_id: str, source: str) -> int:
        """Say where a passage came from, at once and in every snapshot; returns how many rows changed."""
        return self._update([passage_id], None, {"source": source})

    def set_interval(self, ids: Collection[str], live_from: int, live_to: int) -> int:
        """Set from which batch to which passages are visible, at once and in every snapshot: for repair."""
        return self._update(ids, None, {"live_from": int(live_from), "live_to": int(live_to)})

    def delete(self, ids: Collection[str]) -> None:
        """Delete rows that no snapshot shows; their bytes stay in older versions until `purge`."""
        for chunk in chunks(ids):
            with self._writing() as table:
                table.delete(is_in("id", chunk))

    def discard(self, batch_id: int, keep: Collection[str] = frozenset()) -> None:
        """Take back everything that a staged edit batch did here; doing it twice changes nothing more.

        Args:
            batch_id: the batch; it must not be committed.
            keep: ids that were stored, removed, before the batch revived them; they go back to removed
                and are not deleted.
        """
        batch_id = int(batch_id)
        self._update(keep, f"live_from = {batch_id}", {"live_from": 0, "live_to": 0})
        with self._writing() as table:
            table.delete(f"live_from = {batch_id}")
        removed = f"live_to = {batch_id} AND live_from < {batch_id}"
        self._update([row["id"] for row in self._select(removed, ["id"]).to_pylist()], removed, {"live_to": LIVE})

    def purge(self, ids: Collection[str]) -> None:
        """Delete rows so that no file holds anything of them any more.

        Every remaining row is written again, indexes are built anew, and all older versions are
        deleted. Readers in other processes go on with the version that is left. Interrupted, it can be
        run again with the same ids.

        Raises:
            PassageError: a write failed, or an older version could not be deleted.
        """
        with self._writing() as table:
            write_without(table, ids, _READ_ROWS)
            self._build_indexes(rebuild=True)
            self._mend_indexes()
            delete_history(table, PassageError)

    def optimize(self, *, retrain: bool = False) -> None:
        """Build anew the indexes that lack many rows; merge files once there are many, and drop what is then old.

        Merging writes every row again, so an edit of a few passages must not cause it. Versions of the last hour stay
        for those who read them.

        Args:
            retrain: build every index anew and merge all files.
        """
        with self._writing() as table:
            self._build_indexes(rebuild=retrain)
            stats: Any = table.stats()  # a dict, whatever its annotation says
            if retrain or stats["fragment_stats"]["num_fragments"] > _MOST_FILES:
                with read_back(table, [None]):
                    table.optimize(cleanup_older_than=_HISTORY)
            self._mend_indexes()

    def _mend_indexes(self) -> None:
        """Build them anew when those of texts or ids cannot be read: LanceDB may say that an index is written when one
        of its files is not."""
        try:
            run(lambda table: _matching(table, _words("any"), None, 1), self._table)
            run(lambda table: _scan(table, "id = '0'", ["id"]).to_arrow(), self._table)
        except LANCE_ERRORS:
            self._build_indexes(rebuild=True)

    def salvage(self) -> None:
        """Write the table anew from the rows that can be read where a data file is torn or missing.

        Raises:
            PassageError: a write failed, or no row can be read.
        """
        table = self._table
        parts = list(_readable(table, 0, table.count_rows()))
        if not parts:
            raise _unreadable(OSError("no row of it can be read"))
        rows = pa.concat_tables(parts)
        with self._writing(), read_back(table, [None]):
            table.add(rows.cast(table.schema), mode="overwrite")
        with self._writing():
            self._build_indexes(rebuild=True)

    def _build_indexes(self, *, rebuild: bool) -> None:
        present = {column: index.name for index in self._table.list_indices() for column in index.columns}
        n_rows = self._table.count_rows()
        wanted: dict[str, FTS | BTree | IvfFlat] = {column: _full_text() for column in _TEXT_COLUMNS}
        if n_rows >= _ID_INDEX_ROWS:
            wanted["id"] = BTree()
        if n_rows >= self.ann_rows:
            wanted["vector"] = IvfFlat(distance_type="dot", num_partitions=isqrt(n_rows))
        for column, config in wanted.items():
            share = _STALE_TEXT if column in _TEXT_COLUMNS else _STALE
            if rebuild or column not in present or self._is_stale(present[column], share):
                self._table.create_index(column, config=config)
        if rebuild:
            for column in present.keys() - wanted.keys():
                self._table.drop_index(present[column])

    def _is_stale(self, index: str, share: float) -> bool:
        stats = self._table.index_stats(index)
        return stats is None or stats.num_unindexed_rows > share * (stats.num_indexed_rows + stats.num_unindexed_rows)

    def _update(self, ids: Iterable[str], condition: str | None, values: Mapping[str, object]) -> int:
        n_changed = 0
        for chunk in chunks(ids):
            predicate = " AND ".join(filter(None, (is_in("id", chunk), condition)))
            with self._writing() as table, read_back(table, [is_in("id", chunk)]):
                n_changed += table.update(where=predicate, values=dict(values)).rows_updated
        return n_changed

    # reading

    def examined(self) -> Iterator[ExaminedRow]:
        """Every row, with what about it is not as it was written.

        Raises:
            PassageError: the table cannot be read on.
        """
        for batch in self.iter_rows():
            yield from examined_rows(batch, self._table.schema)

    def count_after(self, batch_id: int) -> int:
        """How many rows a later edit batch has written or ended."""
        condition = f"live_from > {int(batch_id)} OR (live_to > {int(batch_id)} AND live_to < {LIVE})"
        return int(self._read(lambda table: table.count_rows(condition)))

    def index_problems(self, ids: Collection[str]) -> list[str]:
        """What the indexes do not find of the rows there are; empty when they are sound.

        Args:
            ids: of all rows, as reading the whole table gave them. The indexes of text and of vectors are tried on some
                of them.

        Raises:
            PassageError: an index cannot be read.
        """
        indexed = {column for index in self._table.list_indices() for column in index.columns}
        problems = [f"there is no full-text index of {column}" for column in _TEXT_COLUMNS if column not in indexed]
        if "id" in indexed and (lost := set(ids) - self.existing(ids)):
            problems.append(f"the index of ids does not find {len(lost)} passages, {min(lost)} first")
        if not problems:
            tried = self.get(sorted(ids)[:: max(1, len(ids) // _PROBED_ROWS)], at=None)
            ways = {"full-text index": self._is_found}
            if "vector" in indexed:
                ways["index of vectors"] = self._is_found_by_vector
            for name, is_found in ways.items():
                if unfound := [row.id for row in tried if not is_found(row)]:
                    problems.append(f"the {name} does not find {len(unfound)} passages, {unfound[0]} first")
        return problems

    def _is_found_by_vector(self, row: StoredRow) -> bool:
        """Whether a search with a row's own vector finds it, with that vector."""
        vector, condition = np.asarray(row.vector, np.float32), is_in("id", [row.id])
        found = self._read(lambda table: _nearest(table, vector, condition, 1)).to_pylist()
        squared = float(vector @ vector)
        return bool(found) and abs(1 - found[0]["_distance"] - squared) <= _TIE * max(1.0, squared)

    def _is_found(self, row: StoredRow) -> bool:
        """Whether a text search finds a row by its longest plain word; true where it has none."""
        word = max(_WORD.findall(row.passage.text), key=len, default="")
        condition = is_in("id", [row.id])
        return not word or bool(self._read(lambda table: _matching(table, _words(word), condition, 1)).num_rows)

    def existing(self, ids: Collection[str]) -> set[str]:
        """Those of `ids` that are stored, in whatever state."""
        return {row["id"] for chunk in chunks(ids) for row in self._select(is_in("id", chunk), ["id"]).to_pylist()}

    def staged_ids(self, batch_id: int) -> set[str]:
        """Passages that an edit batch added or revived."""
        return set(self._select(f"live_from = {int(batch_id)}", ["id"])["id"].to_pylist())

    def get(self, ids: Sequence[str], *, at: int | None) -> list[StoredRow]:
        """Rows by id in one read, in the order of `ids`; what is missing or not visible is left out."""
        if not ids:
            return []
        condition = _all_of(is_in("id", set(ids)), where(at))
        by_id = {row["id"]: to_stored(row) for row in self._select(condition).to_pylist()}
        return [by_id[passage_id] for passage_id in ids if passage_id in by_id]

    def count(self, at: int | None) -> int:
        """Number of rows that are visible."""
        return int(self._read(lambda table: table.count_rows(where(at))))

    def size_bytes(self) -> int:
        """Bytes of the table's data and indexes in its current version."""
        return int(self._read(LanceTable.stats)["total_bytes"])  # type: ignore[index]  # a dict, not what it is typed as

    def iter_rows(
        self, at: int | None = None, columns: Sequence[str] | None = None, filters: Filters | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Visible rows as Arrow record batches, in the order they are stored.

        Args:
            at: the snapshot.
            columns: names to read, all when None.
            filters: what must match as well.
        """
        batches = self._read(lambda table: _scan(table, where(at, filters), columns).to_batches(_READ_ROWS))
        try:
            yield from batches
        except LANCE_ERRORS as error:
            raise _unreadable(error) from error

    def candidates(
        self, ids: Collection[str], vector: Floats, *, at: int | None, filters: Filters | None = None
    ) -> list[Candidate]:
        """Those of `ids` that are visible and match, ordered by inner product with `vector` (E,)."""
        if not ids:
            return []
        query = self._checked(vector)
        rows = self._select(_all_of(is_in("id", ids), where(at, filters))).to_pylist()
        return _best([to_candidate(row, score, score) for row, score in zip(rows, _dot(rows, query), strict=True)])

    def search_vector(
        self, vector: Floats, n: int, *, at: int | None, filters: Filters | None = None
    ) -> list[Candidate]:
        """The `n` visible passages with the highest inner product with `vector` (Eq. 7), equal ones by id.

        Exact until `optimize` has built an approximate index.

        Args:
            vector: the question's embedding, (E,).
            n: how many at most.
            at: the snapshot.
            filters: what must match as well; fewer than `n` come back only when fewer match.

        Raises:
            PassageError: a vector that is not finite or not (E,), or a table that cannot be read.
            FilterError: a filter that cannot be read.
        """
        query, condition = self._checked(vector), where(at, filters)

        def fetch(limit: int) -> list[Candidate]:
            rows = self._read(lambda table: _nearest(table, query, condition, limit)).to_pylist()
            return _best([to_candidate(row, score, score) for row, score in zip(rows, _dot(rows, query), strict=True)])

        return _first(fetch, n)

    def search_text(
        self, question: str, n: int, *, at: int | None, filters: Filters | None = None, vector: Floats | None = None
    ) -> list[Candidate]:
        """The `n` visible passages whose text or title matches best by BM25, equal ones by id.

        Args:
            question: any text; none of it is read as query syntax.
            n: how many at most.
            at: the snapshot.
            filters: what must match as well.
            vector: the question's embedding, (E,), for `vector_score`, which is 0 without it.

        Raises:
            PassageError: as for `search_vector`.
            FilterError: a filter that cannot be read.
        """
        query = np.zeros(self.dim, np.float32) if vector is None else self._checked(vector)
        words = _words(question)
        condition = where(at, filters)

        def fetch(limit: int) -> list[Candidate]:
            rows = self._read(lambda table: _matching(table, words, condition, limit)).to_pylist()
            scored = zip(rows, _dot(rows, query), strict=True)
            return _best([to_candidate(row, row["_score"], vector_score) for row, vector_score in scored])

        return _first(fetch, n)

    def search_hybrid(
        self,
        vector: Floats,
        question: str,
        n: int,
        *,
        at: int | None,
        filters: Filters | None = None,
        by_vector: Callable[[int], list[Candidate]] | None = None,
    ) -> list[Candidate]:
        """Vector and text search fused by reciprocal rank, sum of 1 / (60 + rank); equal ones by id.

        Arguments and errors are those of `search_vector` and `search_text`; `by_vector` gives the best passages in the
        place of the former.
        """
        pool = max(n, _MIN_POOL)
        found: dict[str, Candidate] = {}
        scores: dict[str, float] = {}
        if by_vector is None:
            by_vector = partial(self.search_vector, vector, at=at, filters=filters)
        for ranking in (by_vector(pool), self.search_text(question, pool, at=at, filters=filters, vector=vector)):
            for rank, candidate in enumerate(ranking, start=1):
                found[candidate.id] = candidate
                scores[candidate.id] = scores.get(candidate.id, 0.0) + 1 / (_RANK_OFFSET + rank)
        return _best([replace(found[passage_id], score=score) for passage_id, score in scores.items()])[:n]

    # LanceDB

    def _checked(self, vector: Floats) -> Floats:
        query = np.asarray(vector, np.float32)
        if query.shape != (self.dim,) or not np.isfinite(query).all():
            raise PassageError(
                f"the question's vector is {query.shape}, expected finite numbers of shape ({self.dim},)",
                kept="the table is as it was",
                fix="embed the question with the retriever that the store was made with",
            )
        return query

    def _select(self, condition: str | None, columns: Sequence[str] | None = None) -> pa.Table:
        return self._read(lambda table: _scan(table, condition, columns).to_arrow())

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
            return run(query, self._table)
        except LANCE_ERRORS as error:
            raise _unreadable(error) from error

    @contextmanager
    def _writing(self) -> Iterator[LanceTable]:
        try:
            yield self._table
        except LANCE_ERRORS as error:
            raise PassageError(
                f"the passages table could not be written: {error}",
                kept="rows that were written before; those of a staged edit batch stay invisible",
                fix="look for a full disk or missing permissions and run the command again",
            ) from error


def _absent(uri: str) -> PassageError:
    return PassageError(
        f"there is no passages table in {uri}",
        kept="nothing was made",
        fix="name the folder of an existing store, or ingest something to begin a new one",
    )


def _create(connection: lancedb.DBConnection, dim: int) -> LanceTable:
    table = cast(LanceTable, connection.create_table(_NAME, schema=make_schema(dim)))
    table.set_unenforced_primary_key("id")
    for column in _TEXT_COLUMNS:
        table.create_index(column, config=_full_text())
    return table


def _full_text() -> FTS:
    # ICU finds words in every script, also where no blanks are set; its stop words are those of all
    # languages at once, "city" (stemmed) among them, so they stay in and BM25 weighs them down
    return FTS(base_tokenizer="icu", remove_stop_words=False)


def _all_of(*conditions: str | None) -> str | None:
    return " AND ".join(filter(None, conditions)) or None


def _scan(table: LanceTable, condition: str | None, columns: Sequence[str] | None) -> Any:
    query = table.search() if condition is None else table.search().where(condition)
    return query if columns is None else query.select(list(columns))


def _nearest(table: LanceTable, vector: Floats, condition: str | None, limit: int) -> pa.Table:
    query = table.search(vector, "vector").distance_type("dot").nprobes(_PROBES)
    query = query if condition is None else query.where(condition, prefilter=True)
    return query.select([*_CANDIDATE_COLUMNS, "_distance"]).limit(limit).to_arrow()


def _words(question: str) -> MultiMatchQuery:
    text = question.encode("utf-8", "replace").decode()
    return MultiMatchQuery(text, _TEXT_COLUMNS, boosts=None, operator=FullTextOperator.OR)


def _readable(table: LanceTable, first: int, last: int) -> Iterator[pa.Table]:
    """The rows from `first` to before `last` that can be read, in parts; what cannot be is halved down to rows."""
    if first >= last:
        return
    try:
        yield table.search().offset(first).limit(last - first).to_arrow()
    except LANCE_ERRORS:
        middle = (first + last) // 2
        if middle > first:
            yield from _readable(table, first, middle)
            yield from _readable(table, middle, last)


def _matching(table: LanceTable, words: MultiMatchQuery, condition: str | None, limit: int) -> pa.Table:
    query = table.search(words, query_type="fts")
    query = query if condition is None else query.where(condition, prefilter=True)
    return query.select([*_CANDIDATE_COLUMNS, "_score"]).limit(limit).to_arrow()


def _dot(rows: Sequence[Mapping[str, Any]], query: Floats) -> list[float]:
    """Inner products, each summed in one order, so that a row's score does not depend on its neighbours."""
    return [float((np.asarray(row["vector"], np.float64) * query).sum()) for row in rows]


def _best(candidates: list[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.id))


def _first(fetch: Callable[[int], list[Candidate]], n: int) -> list[Candidate]:
    """The best `n`; more are fetched while ties leave open which of equal candidates are among them."""
    if n < 1:
        return []
    limit = n + 1
    while True:
        candidates = fetch(limit)
        if len(candidates) < limit or candidates[n - 1].score - candidates[-1].score > _TIE:
            return candidates[:n]
        limit *= 4


def _unreadable(error: Exception) -> PassageError:
    return PassageError(
        f"the passages table could not be read: {error}",
        kept="the files are as they were",
        fix="run `knowstore verify`; restore the folder from a backup when the table is damaged",
    )
