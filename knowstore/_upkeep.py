"""Recovery and purging: what a batch that was never committed left, and what is to leave no byte behind."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TypeVar, cast

from knowstore.bank import ExpertBank
from knowstore.catalog import Catalog
from knowstore.passages import PassageTable

PURGE_PENDING = "purge_pending"
_SETTLED = "settled"
_ROWS = 512  # passages in memory

_T = TypeVar("_T")


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
    removed = [passage_id for passage_id, _, live_to in intervals(table) if live_to == batch_id]
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
    for part in parts(list(sources)):
        for row in table.get(part, at=None):
            if row.passage.source not in sources[row.id]:
                table.set_source(row.id, sources[row.id][0])
    catalog.set_setting(_SETTLED, batch_id)


def is_unfinished(catalog: Catalog) -> bool:
    """Whether a crash came between a commit and what follows it."""
    return bool(catalog.setting(PURGE_PENDING)) or catalog.setting(_SETTLED, 0) != catalog.head()


def finish(catalog: Catalog, table: PassageTable, banks: Sequence[ExpertBank]) -> None:
    """Do what follows the latest commit, where a crash came between; the caller is the one writer."""
    finish_purge(catalog, table, banks)
    head = catalog.head()
    if catalog.setting(_SETTLED, 0) != head:
        table.refresh()
        pairs = [pair for pairs in catalog.batch_items(head).values() for pair in pairs]
        settle_sources(catalog, table, head, {passage_id for passage_id, _ in pairs})


def _known(catalog: Catalog) -> set[str]:
    """Passages that a committed batch added and whose rows are kept, be they live or removed."""
    placed = {passage_id for passage_id, _, _ in catalog.intervals()}
    return placed - catalog.purged(placed)


def intervals(table: PassageTable) -> Iterator[tuple[str, int, int]]:
    """(id, live_from, live_to) of every stored row."""
    for batch in table.iter_rows(columns=["id", "live_from", "live_to"]):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def parts(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Passages or their ids in parts of as many as may be in memory."""
    for first in range(0, len(items), _ROWS):
        yield items[first : first + _ROWS]


def purging(ids: Collection[str]) -> dict[str, object]:
    """The setting that says that these passages are to be deleted from every file; it is recorded with their removal,
    so a crash cannot lose it. Empty when there are none."""
    return {PURGE_PENDING: sorted(ids)} if ids else {}


def finish_purge(catalog: Catalog, table: PassageTable, banks: Sequence[ExpertBank]) -> None:
    """Carry out a purge that was asked for, also one that a crash cut short."""
    ids = cast(list[str], catalog.setting(PURGE_PENDING) or [])
    if ids:
        table.refresh()
        table.purge(ids)
        for bank in banks:
            bank.refresh()
            bank.purge(ids)
        catalog.audits.forget(ids)
        catalog.record_purge(catalog.head(), ids)
        catalog.set_setting(PURGE_PENDING, None)
