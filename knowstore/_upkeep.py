"""Recovery, purging, verification and repair: keeping catalog, passages and experts in agreement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import cast

from knowstore._ingest import write_passages
from knowstore._loaded import LoadedModels, OnProgress
from knowstore.bank import ExpertBank
from knowstore.catalog import Catalog
from knowstore.config import Codec
from knowstore.passages import PassageTable
from knowstore.records import Problem, VerifyReport

_LIVE = 2**62
_PENDING = "purge_pending"


def recover(catalog: Catalog, table: PassageTable | None, bank: ExpertBank | None) -> None:
    """Take back what a batch that was never committed left; the caller is the one writer."""
    staged = catalog.staged()
    if staged is None:
        return
    if table is not None and bank is not None:
        table.refresh()
        known = {passage_id for passage_id, _, _ in catalog.intervals()}
        touched = table.staged_ids(staged.id)
        table.discard(staged.id, keep=touched & known)
        gone = (touched | bank.ids_of_batch(staged.id)) - known
        bank.delete(gone - table.existing(gone))
    catalog.discard(staged.id)


def drop_strays(table: PassageTable, bank: ExpertBank, batch_id: int, wanted: Collection[str]) -> None:
    """Delete what an interrupted ingest wrote and the one that goes on with it does not want."""
    strays = (table.staged_ids(batch_id) | bank.ids_of_batch(batch_id)) - set(wanted)
    if strays:
        table.delete(strays)
        bank.delete(strays)


def purge(catalog: Catalog, table: PassageTable, bank: ExpertBank, ids: Collection[str]) -> None:
    """Delete passages and experts from every file. The intent is recorded first, so a crash cannot lose it."""
    catalog.set_setting(_PENDING, sorted(ids))
    finish_purge(catalog, table, bank)


def finish_purge(catalog: Catalog, table: PassageTable, bank: ExpertBank) -> None:
    """Carry out a purge that was asked for, also one that a crash cut short."""
    ids = cast(list[str], catalog.setting(_PENDING) or [])
    if ids:
        table.refresh()
        table.purge(ids)
        bank.purge(ids)
        catalog.record_purge(catalog.head(), ids)
        catalog.set_setting(_PENDING, None)


def verify(catalog: Catalog, table: PassageTable, bank: ExpertBank, on_progress: OnProgress | None) -> VerifyReport:
    """Compare the three stores row by row; see `KnowledgeStore.verify`."""
    head = catalog.head()
    table.refresh()
    bank.refresh()
    expected = {passage_id: (first, last) for passage_id, first, last in catalog.intervals()}
    purged = catalog.purged(expected)
    problems: list[Problem] = []
    rows: Counter[str] = Counter()

    def found(kind: str, detail: str) -> None:
        problems.append(Problem(kind, detail, "run `knowstore verify --repair`"))

    for batch in table.iter_rows(columns=["id", "live_from", "live_to"]):
        for passage_id, live_from, live_to in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            rows[passage_id] += 1
            if live_from > head:
                continue  # staged: invisible, and finished or discarded by the next write
            if passage_id not in expected:
                found("orphan passage", f"passage {passage_id} is in the table and in no edit batch")
                continue
            first, last = expected[passage_id]
            is_visible = live_from <= head < live_to
            if is_visible != (last is None):
                state = "live" if last is None else "removed"
                found("wrong visibility", f"passage {passage_id} is {state} in the catalog and not in the table")
            elif last is None and live_from != first:
                found(
                    "wrong visibility", f"passage {passage_id} is live since batch {first}, the table says {live_from}"
                )
    for passage_id, n in rows.items():
        if n > 1:
            found("duplicate passage", f"passage {passage_id} is in the table {n} times")
    live = {passage_id for passage_id, (_, last) in expected.items() if last is None}
    for passage_id in sorted(live - rows.keys()):
        found("missing passage", f"passage {passage_id} is live in the catalog and not in the table")
    for passage_id in sorted(purged & rows.keys()):
        found("purged passage", f"passage {passage_id} was purged and is in the table")
    n_experts = _verify_experts(bank, live, set(rows), on_progress, problems)
    pending = catalog.setting(_PENDING)
    if pending:
        found("unfinished purge", f"{len(cast(list[str], pending))} passages are still to be purged")
    checked = {"passages": len(rows), "experts": n_experts, "live": len(live)}
    return VerifyReport(not problems, tuple(problems), checked)


def _verify_experts(
    bank: ExpertBank, live: set[str], stored: set[str], on_progress: OnProgress | None, problems: list[Problem]
) -> int:
    seen: set[str] = set()
    for n, expert in enumerate(bank.iter_encoded(), 1):
        seen.add(expert.passage_id)
        if on_progress is not None and n % 1000 == 0:
            on_progress("verifying", n, None)
    for passage_id, problem in bank.verify():
        problems.append(Problem("damaged expert", f"{passage_id}: {problem}", "run `knowstore verify --repair`"))
    fix = "run `knowstore verify --repair`"
    problems += [Problem("missing expert", f"passage {one} has none", fix) for one in sorted(live - seen)]
    problems += [
        Problem("orphan expert", f"the expert of passage {one} has no passage", fix) for one in sorted(seen - stored)
    ]
    return len(seen)


def repair(
    catalog: Catalog,
    table: PassageTable,
    bank: ExpertBank,
    models: LoadedModels,
    codec: Codec,
    on_progress: OnProgress | None,
) -> VerifyReport:
    """Mend what the catalog and the passages' text determine, then verify again. What cannot be mended (a live
    passage whose text is gone) is what the report still holds; its source has to be ingested again."""
    recover(catalog, table, bank)
    head = catalog.head()
    by_kind: dict[str, list[str]] = {}
    expected = {passage_id: (first, last) for passage_id, first, last in catalog.intervals()}
    purged = catalog.purged(expected)
    rows = {
        passage_id: (live_from, live_to)
        for batch in table.iter_rows(columns=["id", "live_from", "live_to"])
        for passage_id, live_from, live_to in zip(*(column.to_pylist() for column in batch.columns), strict=True)
    }
    table.delete([passage_id for passage_id in rows if passage_id not in expected or passage_id in purged])
    for passage_id, (live_from, live_to) in rows.items():
        if passage_id in expected and passage_id not in purged:
            first, last = expected[passage_id]
            is_visible = live_from <= head < live_to
            if is_visible != (last is None) or (last is None and live_from != first):
                by_kind.setdefault(f"{first}/{last if last is not None else _LIVE}", []).append(passage_id)
    for interval, ids in by_kind.items():
        first, last = (int(part) for part in interval.split("/"))
        table.set_interval(ids, first, last)
    stored = {passage_id for passage_id in rows if passage_id in expected and passage_id not in purged}
    damaged = {passage_id for passage_id, _ in bank.verify()}
    present = {expert.passage_id for expert in bank.iter_encoded()}
    bank.delete((present - stored) | damaged)
    wanted = [passage_id for passage_id in stored if passage_id in damaged or passage_id not in present]
    if wanted:
        regenerated = [row.passage for row in table.get(wanted, at=None)]
        write_passages(regenerated, len(regenerated), table, bank, models, codec, head, on_progress)
    return verify(catalog, table, bank, on_progress)
