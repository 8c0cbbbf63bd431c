"""Repair: what verification finds is mended where the catalog, the passages' texts or their ids determine it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from knowstore._encoding import InProcess, embedded_rows
from knowstore._ingest import counted, stored_batches
from knowstore._loaded import LoadedModels, OnProgress
from knowstore._tables import Tables
from knowstore._upkeep import finish_purge, intervals, parts, recover
from knowstore._verification import Expected, index_problems, verify
from knowstore.bank import ExpertBank
from knowstore.catalog import Catalog
from knowstore.config import Codec
from knowstore.errors import BankError, CatalogError, PassageError
from knowstore.passages import LIVE, ExaminedRow, PassageRow, PassageTable, mended_date, mended_text
from knowstore.records import Passage, Problem, VerifyReport


def repair(
    catalog: Catalog,
    tables: Tables,
    models: LoadedModels,
    codec: Codec,
    on_progress: OnProgress | None,
) -> VerifyReport:
    """Mend what the catalog, the ids and the passages' text determine, then verify again. What cannot be mended (a
    passage, live or removed, whose text is gone) is what the report still holds. The catalog is mended already.

    Raises:
        ConfigError: vectors or experts have to be made, by other models than those the store was made with.
    """
    try:
        table = _readable_table(tables.passages())
        bank = _readable_bank(tables)
        Expected.read(catalog, (table, bank))  # by which everything is mended
    except (PassageError, CatalogError):
        return verify(catalog, tables, models, on_progress)
    _rebuild_indexes(table, bank)  # first: by them rows are found that are to be changed
    finish_purge(catalog, table, tables.banks())
    recover(catalog, table, bank)
    work = _Work(catalog, table, bank, models, codec, on_progress)
    work.place_lost()
    work.rebuild_passages()
    work.settle_rows()
    work.make_experts()
    catalog.mend()
    report = verify(catalog, tables, models, on_progress)
    return replace(report, clean=report.clean and not work.lost, problems=(*report.problems, *work.lost))


def _readable_table(table: PassageTable) -> PassageTable:
    """The passages table, written anew from what of it can be read where a file is torn or missing."""
    try:
        for _ in table.iter_rows():
            pass
    except PassageError:
        table.salvage()
    return table


def _readable_bank(tables: Tables) -> ExpertBank:
    """The bank, empty where files of it cannot be read: experts can be made again."""
    try:
        bank = tables.bank()
    except BankError:
        return tables.remade_bank()
    try:
        for _ in bank.iter_encoded():
            pass
    except BankError:
        bank.clear()
    return bank


def _rebuild_indexes(table: PassageTable, bank: ExpertBank) -> None:
    """Every index of a table anew when one of them does not find what there is."""
    if index_problems(table, {passage_id for passage_id, _, _ in intervals(table)}):
        table.optimize(retrain=True)
    if index_problems(bank, bank.ids()):
        bank.rebuild_index()


@dataclass(frozen=True)
class _Work:
    """The steps of a repair, each of which leaves less to mend."""

    catalog: Catalog
    table: PassageTable
    bank: ExpertBank
    models: LoadedModels
    codec: Codec
    on_progress: OnProgress | None
    lost: list[Problem] = field(default_factory=list)

    def expected(self) -> Expected:
        return Expected.read(self.catalog, (self.table, self.bank))

    def place_lost(self) -> None:
        """Placements that the catalog lost: nothing but a commit makes a sound row visible since a batch."""
        expected = self.expected()
        self.catalog.place(
            [
                (one.passage_id, one.passage.source, one.live_from, _end(one, expected))
                for one in self.table.examined()
                if not one.problem and one.passage is not None
                if one.passage_id not in expected.intervals and one.live_from in expected.batches
            ]
        )

    def rebuild_passages(self) -> None:
        """Rows that are not what was written, from the text that they or others still have."""
        expected = self.expected()
        known = expected.owned
        unsound = [one for one in self.table.examined() if one.problem]
        bad = {one.passage_id for one in unsound}
        checksums = {one.checksum for one in unsound if one.checksum}
        texts: dict[str, Passage] = {}
        for one in self.table.examined():
            if one.passage is None:
                continue
            holder = one.passage.passage_id
            if holder in known and (one.problem or one.passage_id in bad):
                texts.setdefault(holder, mended_date(one.passage, checksums))
            elif one.problem and one.passage_id in known and (passage := mended_text(one.passage, one.passage_id)):
                texts.setdefault(one.passage_id, mended_date(passage, checksums))
            if one.passage.date and holder in texts and not texts[holder].date:
                self.lost.append(_lost_date(holder))
        if texts:
            self.models.check_store(self.catalog.setting("fingerprints"))
        self.table.delete(bad)
        stored = self.table.existing(texts)
        self._embed([texts[passage_id] for passage_id in sorted(texts.keys() - stored)], expected)

    def _embed(self, passages: list[Passage], expected: Expected) -> None:
        for part in parts(passages):
            settled = [_settled(passage, expected) for passage in part]
            self.table.add(embedded_rows(self.models.retriever, settled), expected.head)

    def settle_rows(self) -> None:
        """Rows once each, visible when the catalog says, from a source that the catalog knows."""
        expected = self.expected()
        rows: Counter[str] = Counter()
        wrong: set[str] = set()
        for passage_id, live_from, live_to in intervals(self.table):
            rows[passage_id] += 1
            if passage_id in expected.intervals and not expected.is_right(passage_id, live_from, live_to):
                wrong.add(passage_id)
        stored = rows.keys() & expected.owned
        self.table.delete(rows.keys() - stored)
        twice = {passage_id for passage_id in stored if rows[passage_id] > 1}
        self._write_once(sorted(twice), expected.head)
        self._show(sorted(stored & (wrong | twice)), expected)
        for one in self.table.examined():
            if one.passage is not None and expected.is_wrong_source(one):
                self.table.set_source(one.passage_id, _settled(one.passage, expected).source)

    def _write_once(self, passage_ids: list[str], head: int) -> None:
        for part in parts(passage_ids):
            once = self.table.get(part, at=None)
            self.table.delete(part)
            rows = [PassageRow(row.passage, row.vector, row.segments, row.segment_vectors) for row in once]
            self.table.add(rows, head)

    def _show(self, passage_ids: Iterable[str], expected: Expected) -> None:
        by_interval: dict[tuple[int, int], list[str]] = {}
        for passage_id in passage_ids:
            first, last = expected.intervals[passage_id]
            by_interval.setdefault((first, LIVE if last is None else last), []).append(passage_id)
        for interval, ids in by_interval.items():
            self.table.set_interval(ids, *interval)

    def make_experts(self) -> None:
        """Experts of every stored passage that has none, or a damaged one; none of what no batch added. That of a
        passage whose text is lost waits for it."""
        stored = {passage_id for passage_id, _, _ in intervals(self.table)}
        damaged = {passage_id for passage_id, _ in self.bank.verify(shape=self.models.shape_of(self.bank.fingerprint))}
        present = self.bank.ids()
        wanted = sorted(stored & damaged | stored - present)
        if wanted:
            self.models.check_store(self.catalog.setting("fingerprints"))
        self.bank.delete((present - stored - self.expected().owned) | damaged)
        on_done = counted(self.on_progress, "generating experts", len(wanted))
        batches = stored_batches(self.table, wanted)
        InProcess(self.models).remake(batches, self.bank, self.codec, self.catalog.head(), on_done)


def _end(one: ExaminedRow, expected: Expected) -> int | None:
    """The batch that removed the passage of a row, as far as the row says."""
    return one.live_to if one.live_to in expected.batches and one.live_to > one.live_from else None


def _lost_date(passage_id: str) -> Problem:
    what = f"the date of passage {passage_id} was damaged, it has none now"
    fix = f"run `knowstore remove {passage_id} --purge` and ingest its source again"  # the same text has the same row
    return Problem("lost date", what, fix)


def _settled(passage: Passage, expected: Expected) -> Passage:
    """The passage from a source that the catalog knows."""
    sources = expected.sources[passage.passage_id]
    return passage if passage.source in sources else replace(passage, source=min(sources))
