"""Recovery, purging, verification and repair: keeping catalog, passages and experts in agreement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from knowstore._ingest import write_experts
from knowstore._loaded import LoadedModels, OnProgress
from knowstore.bank import ExpertBank
from knowstore.catalog import Catalog
from knowstore.config import Codec
from knowstore.passages import PassageRow, PassageTable
from knowstore.records import Problem, VerifyReport

_LIVE = 2**62
_PENDING = "purge_pending"
_SETTLED = "settled"
_REPAIR = "run `knowstore verify --repair`"
_ROWS = 512  # passages in memory


def recover(catalog: Catalog, table: PassageTable | None, bank: ExpertBank | None) -> None:
    """Take back what a batch that was never committed left; the caller is the one writer."""
    staged = catalog.staged()
    if staged is None:
        return
    if table is not None and bank is not None:
        table.refresh()
        bank.refresh()
        known = _known(catalog)
        touched = table.staged_ids(staged.id)
        table.discard(staged.id, keep=touched & known)
        gone = (touched | bank.ids_of_batch(staged.id)) - known
        bank.delete(gone - table.existing(gone))
    catalog.discard(staged.id)


def resume(catalog: Catalog, table: PassageTable, bank: ExpertBank, batch_id: int, wanted: Collection[str]) -> None:
    """Let an ingest go on with the batch of an interrupted one: of what that generated only `wanted` stays, and
    what it removed or brought back is as it was before."""
    known = _known(catalog)
    staged = table.staged_ids(batch_id)
    table.set_interval(staged & known, 0, 0)
    removed = [passage_id for passage_id, _, live_to in _intervals(table) if live_to == batch_id]
    table.revive(removed, batch_id)
    strays = (staged | bank.ids_of_batch(batch_id)) - known - set(wanted)
    table.delete(strays)
    bank.delete(strays)


def settle_sources(catalog: Catalog, table: PassageTable, batch_id: int, ids: Collection[str]) -> None:
    """Say of live passages whose source a batch has taken away, while another still has them, that they are from that,
    and note that this is done for the batch."""
    sources: dict[str, list[str]] = {}
    for passage_id, source in catalog.live_placements(passage_ids=ids):
        sources.setdefault(passage_id, []).append(source)
    for part in _parts(list(sources)):
        for row in table.get(part, at=None):
            if row.passage.source not in sources[row.id]:
                table.set_source(row.id, sources[row.id][0])
    catalog.set_setting(_SETTLED, batch_id)


def is_unfinished(catalog: Catalog) -> bool:
    """Whether a crash came between a commit and what follows it."""
    return bool(catalog.setting(_PENDING)) or catalog.setting(_SETTLED, 0) != catalog.head()


def finish(catalog: Catalog, table: PassageTable, bank: ExpertBank) -> None:
    """Do what follows the latest commit, where a crash came between; the caller is the one writer."""
    finish_purge(catalog, table, bank)
    head = catalog.head()
    if catalog.setting(_SETTLED, 0) != head:
        table.refresh()
        pairs = [pair for pairs in catalog.batch_items(head).values() for pair in pairs]
        settle_sources(catalog, table, head, {passage_id for passage_id, _ in pairs})


def _known(catalog: Catalog) -> set[str]:
    """Passages that a committed batch added and whose rows are kept, be they live or removed."""
    placed = {passage_id for passage_id, _, _ in catalog.intervals()}
    return placed - catalog.purged(placed)


def _intervals(table: PassageTable) -> Iterator[tuple[str, int, int]]:
    """(id, live_from, live_to) of every stored row."""
    for batch in table.iter_rows(columns=["id", "live_from", "live_to"]):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(ids), _ROWS):
        yield ids[first : first + _ROWS]


def purge(catalog: Catalog, table: PassageTable, bank: ExpertBank, ids: Collection[str]) -> None:
    """Delete passages and experts from every file. The intent is recorded first, so a crash cannot lose it."""
    catalog.set_setting(_PENDING, sorted(ids))
    finish_purge(catalog, table, bank)


def finish_purge(catalog: Catalog, table: PassageTable, bank: ExpertBank) -> None:
    """Carry out a purge that was asked for, also one that a crash cut short."""
    ids = cast(list[str], catalog.setting(_PENDING) or [])
    if ids:
        table.refresh()
        bank.refresh()
        table.purge(ids)
        bank.purge(ids)
        catalog.record_purge(catalog.head(), ids)
        catalog.set_setting(_PENDING, None)


@dataclass(frozen=True)
class _Expected:
    """What the catalog says of the rows there should be; `intervals` has (live_from, live_to) by passage id, and
    `staged` is the batch that is being written, whose rows nobody sees yet."""

    head: int
    staged: int | None
    intervals: dict[str, tuple[int, int | None]]
    purged: set[str]
    pending: list[str]

    @classmethod
    def read(cls, catalog: Catalog, table: PassageTable, bank: ExpertBank) -> _Expected:
        """Read the catalog and see the tables anew, again when a batch was committed meanwhile."""
        while True:
            mark = cls._mark(catalog)
            bank.refresh()
            table.refresh()
            intervals = {passage_id: (first, last) for passage_id, first, last in catalog.intervals()}
            purged = catalog.purged(intervals)
            if cls._mark(catalog) == mark:
                return cls(*mark[:2], intervals, purged, mark[2])

    @staticmethod
    def _mark(catalog: Catalog) -> tuple[int, int | None, list[str]]:
        staged = catalog.staged()
        return catalog.head(), None if staged is None else staged.id, cast(list[str], catalog.setting(_PENDING) or [])

    @property
    def live(self) -> set[str]:
        return {passage_id for passage_id, (_, last) in self.intervals.items() if last is None}

    def is_right(self, passage_id: str, live_from: int, live_to: int) -> bool:
        """Whether a row is visible when it should be, now and after any later batch."""
        first, last = self.intervals[passage_id]
        if last is None:
            return live_from == first and live_to in (_LIVE, self.staged)
        return live_to <= self.head


def verify(catalog: Catalog, table: PassageTable, bank: ExpertBank, on_progress: OnProgress | None) -> VerifyReport:
    """Compare the three stores row by row; see `KnowledgeStore.verify`."""
    expected = _Expected.read(catalog, table, bank)
    problems: list[Problem] = []
    rows: Counter[str] = Counter()

    def found(kind: str, detail: str, fix: str = _REPAIR) -> None:
        problems.append(Problem(kind, detail, fix))

    for passage_id, live_from, live_to in _intervals(table):
        rows[passage_id] += 1
        if live_from == expected.staged:
            continue  # invisible, and finished or discarded by the next write
        if passage_id not in expected.intervals:
            found("orphan passage", f"passage {passage_id} is in the table and in no edit batch")
        elif not expected.is_right(passage_id, live_from, live_to):
            first, last = expected.intervals[passage_id]
            state = f"live since batch {first}" if last is None else f"removed by batch {last}"
            found(
                "wrong visibility",
                f"passage {passage_id} is {state}, the table shows it from {live_from} to before {live_to}",
            )
    for passage_id, n in rows.items():
        if n > 1:
            found("duplicate passage", f"passage {passage_id} is in the table {n} times")
    live = expected.live
    for passage_id in sorted(live - rows.keys()):
        found(
            "missing passage",
            f"passage {passage_id} is live in the catalog and not in the table",
            f"run `knowstore remove {passage_id}` and ingest its source again",
        )
    for passage_id in sorted(expected.purged & rows.keys()):
        found("purged passage", f"passage {passage_id} was purged and is in the table")
    n_experts = 0
    seen: set[str] = set()
    for expert in bank.iter_encoded():
        n_experts += 1
        seen.add(expert.passage_id)
        if expert.passage_id not in rows and expert.batch_id != expected.staged:
            found("orphan expert", f"the expert of passage {expert.passage_id} has no passage")
        if on_progress is not None and n_experts % 1000 == 0:
            on_progress("verifying", n_experts, None)
    for passage_id, problem in bank.verify():
        found("damaged expert", f"{passage_id}: {problem.what}")
    for passage_id in sorted((live & rows.keys()) - seen):
        found("missing expert", f"passage {passage_id} has none")
    if expected.pending:
        found("unfinished purge", f"{len(expected.pending)} passages are still to be purged")
    checked = {"passages": len(rows), "experts": n_experts, "live": len(live)}
    return VerifyReport(not problems, tuple(problems), checked)


def repair(
    catalog: Catalog,
    table: PassageTable,
    bank: ExpertBank,
    models: LoadedModels,
    codec: Codec,
    on_progress: OnProgress | None,
) -> VerifyReport:
    """Mend what the catalog and the passages' text determine, then verify again. What cannot be mended (a live
    passage whose text is gone) is what the report still holds.

    Raises:
        ConfigError: experts have to be generated, by other models than those the store was made with.
    """
    recover(catalog, table, bank)
    expected = _Expected.read(catalog, table, bank)
    rows: dict[str, list[tuple[int, int]]] = {}
    for passage_id, live_from, live_to in _intervals(table):
        rows.setdefault(passage_id, []).append((live_from, live_to))
    stored = rows.keys() & (expected.intervals.keys() - expected.purged)
    damaged = {passage_id for passage_id, _ in bank.verify()}
    present = {expert.passage_id for expert in bank.iter_encoded()}
    ungenerated = sorted(stored & damaged | stored - present)
    if ungenerated:
        models.check_store(catalog.setting("fingerprints"))

    table.delete(rows.keys() - stored)
    for part in _parts([passage_id for passage_id in sorted(stored) if len(rows[passage_id]) > 1]):
        once = table.get(part, at=None)
        table.delete(part)
        table.add(
            [PassageRow(row.passage, row.vector, row.segments, row.segment_vectors) for row in once], expected.head
        )
    wrong: dict[tuple[int, int], list[str]] = {}
    for passage_id in sorted(stored):
        if len(rows[passage_id]) > 1 or not expected.is_right(passage_id, *rows[passage_id][0]):
            first, last = expected.intervals[passage_id]
            wrong.setdefault((first, _LIVE if last is None else last), []).append(passage_id)
    for interval, ids in wrong.items():
        table.set_interval(ids, *interval)

    bank.delete((present - stored) | damaged)
    for part in _parts(ungenerated):
        passages = [row.passage for row in table.get(part, at=None)]
        write_experts(passages, bank, models, codec, expected.head, on_progress)
    return verify(catalog, table, bank, on_progress)
