"""Verification: what the catalog says there should be, compared with what is there, row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar, cast

from knowstore._loaded import LoadedModels, OnProgress
from knowstore._tables import Tables
from knowstore._upkeep import PURGE_PENDING, intervals
from knowstore.bank import ExpertBank
from knowstore.catalog import Catalog
from knowstore.errors import BankError, CatalogError, PassageError
from knowstore.passages import LIVE, ExaminedRow, PassageTable
from knowstore.records import Problem, VerifyReport

_REPAIR = "run `knowstore verify --repair`"
_BACKUP = "restore it from a backup, or ingest again into a new store"
_TRIES = 5  # while others write
_T = TypeVar("_T")


@dataclass(frozen=True)
class Expected:
    """What the catalog says of the rows there should be; `intervals` has (live_from, live_to) by passage id,
    `sources` the sources it ever came from, `batches` all committed ones, and `staged` is the batch that is being
    written, whose rows nobody sees yet."""

    head: int
    staged: int | None
    intervals: dict[str, tuple[int, int | None]]
    sources: dict[str, set[str]]
    batches: set[int]
    purged: set[str]
    pending: list[str]

    @classmethod
    def read(cls, catalog: Catalog, tables: Iterable[PassageTable | ExpertBank]) -> Expected:
        """Read the catalog and see the tables anew, again when a batch was committed meanwhile."""
        tables = list(tables)
        while True:
            mark = cls._mark(catalog)
            for table in tables:
                table.refresh()
            placed = {passage_id: (first, last) for passage_id, first, last in catalog.intervals()}
            purged = catalog.purged(placed)
            sources, batches = catalog.placed_sources(), catalog.live_batches()
            if cls._mark(catalog) == mark:
                return cls(*mark[:2], placed, sources, batches, purged, mark[2])

    @staticmethod
    def _mark(catalog: Catalog) -> tuple[int, int | None, list[str]]:
        staged, pending = catalog.staged(), cast(list[str], catalog.setting(PURGE_PENDING) or [])
        return catalog.head(), None if staged is None else staged.id, pending

    @property
    def live(self) -> set[str]:
        return {passage_id for passage_id, (_, last) in self.intervals.items() if last is None}

    @property
    def owned(self) -> set[str]:
        """Passages whose rows and experts are kept: live ones, and removed ones, which a rollback brings back."""
        return self.intervals.keys() - self.purged - set(self.pending)

    def is_wrong_source(self, one: ExaminedRow) -> bool:
        """Whether a sound row is said to be from where its passage never came from."""
        sources = self.sources.get(one.passage_id)
        return sources is not None and one.passage is not None and one.passage.source not in sources

    def is_right(self, passage_id: str, live_from: int, live_to: int) -> bool:
        """Whether a row is visible when it should be; (0, 0) is a removed passage's whose return was discarded."""
        first, last = self.intervals[passage_id]
        if last is None:
            return live_from == first and live_to in (LIVE, self.staged)
        return (live_from, live_to) in ((first, last), (0, 0))


def verify(catalog: Catalog, tables: Tables, models: LoadedModels, on_progress: OnProgress | None) -> VerifyReport:
    """Compare the three stores row by row; see `KnowledgeStore.verify`. What is found while another process writes is
    looked at again: a purge deletes the files that are being read. Where the catalog cannot be read, what is wrong with
    it is all there is to say."""
    try:
        for _ in range(_TRIES):
            report, state = _verified(catalog, tables, models, on_progress)
            if report.clean or state == _state(catalog, _opened(_Findings(None), tables)):
                break
        return report
    except CatalogError:
        found = _Findings(None)
        found.catalog(catalog)
        if not found.problems:
            raise
        return VerifyReport(False, tuple(found.problems))


def _verified(
    catalog: Catalog, tables: Tables, models: LoadedModels, on_progress: OnProgress | None
) -> tuple[VerifyReport, object]:
    """A report, and the state of the store when it was begun."""
    found = _Findings(on_progress)
    found.catalog(catalog)
    table, bank = _opened(found, tables)
    expected = Expected.read(catalog, [one for one in (table, bank) if one is not None])
    state = _state(catalog, (table, bank))
    rows: Counter[str] | None = None
    if table is not None:
        rows = found.reading("passages", lambda: found.passages(expected, table))
    if bank is not None:
        found.reading("experts", lambda: found.experts(expected, bank, models, rows))
    if expected.pending:
        found.add("unfinished purge", f"{len(expected.pending)} passages are still to be purged")
    checked = {"passages": len(rows or ()), "experts": found.n_experts, "live": len(expected.live)}
    return VerifyReport(not found.problems, tuple(found.problems), checked), state


def _opened(found: _Findings, tables: Tables) -> tuple[PassageTable | None, ExpertBank | None]:
    return found.opened("passages", tables.passages), found.opened("experts", tables.bank)


def _state(catalog: Catalog, tables: Iterable[PassageTable | ExpertBank | None]) -> object:
    """What changes with everything that is written."""
    return catalog.head(), [None if table is None else table.version for table in tables]


def index_problems(table: PassageTable | ExpertBank, ids: Collection[str]) -> list[str]:
    """What a table's indexes do not find of the rows with these ids, or why they cannot be read."""
    try:
        return table.index_problems(ids)
    except (PassageError, BankError) as error:
        return [error.what]


class _Findings:
    """Collects problems, and what a table that cannot be read leaves unknown."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self.problems: list[Problem] = []
        self.n_experts = 0
        self._on_progress = on_progress

    def add(self, kind: str, detail: str, fix: str = _REPAIR) -> None:
        self.problems.append(Problem(kind, detail, fix))

    def catalog(self, catalog: Catalog) -> None:
        """Problems of the catalog alone."""
        for fault in catalog.faults():
            self.add(fault.kind, fault.detail, _REPAIR if fault.is_mendable else "restore the catalog from a backup")

    def opened(self, name: str, open_: Callable[[], _T]) -> _T | None:
        try:
            return open_()
        except (PassageError, BankError) as error:
            self.add(f"unreadable {name}", error.what, _REPAIR if name == "experts" else _BACKUP)
            return None

    def reading(self, name: str, read: Callable[[], _T]) -> _T | None:
        try:
            return read()
        except (PassageError, BankError) as error:
            self.add(f"unreadable {name}", error.what, f"{_REPAIR}; else {_BACKUP}")
            return None

    def passages(self, expected: Expected, table: PassageTable) -> Counter[str]:
        """Problems of the passages table; returns how often each id is in it."""
        rows: Counter[str] = Counter()
        for passage_id, live_from, live_to in intervals(table):
            rows[passage_id] += 1
            if live_from == expected.staged:
                continue  # invisible, and finished or discarded by the next write
            self._visibility(expected, passage_id, live_from, live_to)
        for passage_id, n in rows.items():
            if n > 1:
                self.add("duplicate passage", f"passage {passage_id} is in the table {n} times")
        for passage_id in sorted(expected.owned - rows.keys()):
            self._missing(passage_id, expected.intervals[passage_id][1])
        for passage_id in sorted(expected.purged & rows.keys()):
            self.add("purged passage", f"passage {passage_id} was purged and is in the table")
        for one in table.examined():
            if one.problem:
                self.add("damaged passage", f"{one.passage_id}: {one.problem}")
            elif expected.is_wrong_source(one):
                self.add("wrong source", f"passage {one.passage_id} never came from where the table says")
        self._indexes(table, rows.keys())
        return rows

    def _missing(self, passage_id: str, removed_by: int | None) -> None:
        if removed_by is None:
            what = f"passage {passage_id} is live in the catalog and not in the table"
            fix = f"run `knowstore remove {passage_id}` and ingest its source again"
        else:
            what = f"passage {passage_id}, removed by batch {removed_by}, is lost: no rollback can bring it back"
            fix = f"ingest its source again, or give it up with `knowstore remove {passage_id} --purge`"
        self.add("missing passage", what, fix)

    def _indexes(self, table: PassageTable | ExpertBank, ids: Collection[str]) -> None:
        for problem in index_problems(table, ids):
            self.add("damaged index", problem)

    def _visibility(self, expected: Expected, passage_id: str, live_from: int, live_to: int) -> None:
        if passage_id not in expected.intervals:
            self.add("orphan passage", f"passage {passage_id} is in the table and in no edit batch")
        elif not expected.is_right(passage_id, live_from, live_to):
            first, last = expected.intervals[passage_id]
            state = f"live since batch {first}" if last is None else f"removed by batch {last}"
            shown = f"the table shows it from {live_from} to before {live_to}"
            self.add("wrong visibility", f"passage {passage_id} is {state}, {shown}")

    def experts(self, expected: Expected, bank: ExpertBank, models: LoadedModels, rows: Counter[str] | None) -> None:
        """Problems of the bank; `rows` are the passages there are, None when nobody knows."""
        seen: set[str] = set()
        kept = expected.owned
        for expert in bank.iter_encoded():
            self.n_experts += 1
            seen.add(expert.passage_id)
            is_known = rows is None or expert.passage_id in rows or expert.passage_id in kept
            if not is_known and expert.batch_id != expected.staged:
                self.add("orphan expert", f"the expert of passage {expert.passage_id} has no passage")
            if self._on_progress is not None and self.n_experts % 1000 == 0:
                self._on_progress("verifying", self.n_experts, None)
        for passage_id, problem in bank.verify(shape=models.shape_of(bank.fingerprint)):
            self.add("damaged expert", f"{passage_id}: {problem.what}")
        self._indexes(bank, seen)
        if rows is not None:
            for passage_id in sorted((kept & rows.keys()) - seen):
                self.add("missing expert", f"passage {passage_id} has none")
