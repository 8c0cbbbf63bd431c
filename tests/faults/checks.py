"""What must hold of a store after it was interrupted: read from the files row by row, not through `verify` alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from knowstore._tables import bank_name
from knowstore.bank import bank_names
from knowstore.passages import StoredRow
from knowstore.passages.rows import to_stored
from knowstore.records import Passage
from knowstore.sources import sentence_spans
from knowstore.store import KnowledgeStore

State = list[list[list[Any]]]
PARTS = ("placements", "passages", "models", "audits")
EMPTY: State = [[] for _ in PARTS]


def state(store: KnowledgeStore) -> State:
    """All that a reader can see, as JSON: placements, live passages with their sources and experts' checksums, the
    models in use and those that an undo would bring back, and what finished audits found."""
    live = store.passages()
    experts = {one.passage_id: one.checksum for one in store._tables.bank().iter_encoded()} if live else {}
    rows = [[one.passage_id, one.passage.text, one.passage.source, experts.get(one.passage_id)] for one in live]
    models = [_models(store)] if live else []
    return [sorted(map(list, store.catalog.live_placements())), sorted(rows), models, _audits(store)]


def _models(store: KnowledgeStore) -> list[Any]:
    recorded: Any = store.catalog.setting("fingerprints")
    previous: Any = store.catalog.setting("previous_models")
    undone = previous and [previous["fingerprints"]["experts"], previous["models"]["hypernetwork"]]
    return [recorded["experts"], store.catalog.setting("models"), undone]


def _audits(store: KnowledgeStore) -> list[list[Any]]:
    log = store.catalog.audits
    answers = ((audit.batch_id, asdict(one)) for audit in log.audits() for one in log.answers(audit.id))
    found: list[list[Any]] = [[batch_id, *one.values()] for batch_id, one in answers]
    return cast(list[list[Any]], json.loads(json.dumps(found)))


@dataclass(frozen=True)
class Files:
    """Every row of both tables, and what the catalog says should be in them."""

    rows: list[StoredRow]
    experts: list[Any]
    live: dict[str, set[str]]
    known: set[str]
    head: int

    @classmethod
    def read(cls, store: KnowledgeStore) -> Files:
        live: dict[str, set[str]] = {}
        for passage_id, source in store.catalog.live_placements():
            live.setdefault(passage_id, set()).add(source)
        rows, experts = [], []
        if store.layout.has_tables:
            table, bank = store._tables.passages(), store._tables.bank()
            rows = [to_stored(row) for batch in table.iter_rows() for row in batch.to_pylist()]
            experts = list(bank.iter_encoded())
        known = {passage_id for passage_id, _, _ in store.catalog.intervals()}
        return cls(rows, experts, live, known - store.catalog.purged(known), store.catalog.head())


def disagreements(store: KnowledgeStore) -> list[str]:
    """Live passages that are lost, shown wrongly or with another's vector or expert, and ghosts among the visible."""
    store._follow(store.catalog.setting("fingerprints"))
    files = Files.read(store)
    shown = [row for row in files.rows if row.live_from <= files.head < row.live_to]
    found = [f"loss: live passage {one} has no row" for one in files.live.keys() - {row.id for row in shown}]
    found += [f"ghost: row {row.id} is shown and not live" for row in shown if row.id not in files.live]
    found += [f"duplicate: {one} in passages" for one, n in Counter(row.id for row in shown).items() if n > 1]
    experts = {one.passage_id: one for one in files.experts}
    found += [
        f"duplicate: {one} in experts" for one, n in Counter(e.passage_id for e in files.experts).items() if n > 1
    ]
    for row in shown:
        if row.passage.passage_id != row.id or not _is_vector_of(store, row):
            found.append(f"mixed up: row {row.id} is of another passage")
        if row.passage.source not in files.live.get(row.id, {row.passage.source}):
            found.append(f"stale source: row {row.id} says {row.passage.source!r}")
        if row.id not in experts:
            found.append(f"loss: live passage {row.id} has no expert")
    kept = [row for row in shown if row.id in experts]
    return found + _wrong_experts(store, [row.passage for row in kept], [experts[row.id].decode() for row in kept])


def leftovers(store: KnowledgeStore) -> list[str]:
    """Rows that no committed batch knows, and anything that waits to be finished: none after a command has ended."""
    files = Files.read(store)
    found = [f"orphan: passage {row.id}" for row in files.rows if row.id not in files.known]
    found += [f"orphan: expert {one.passage_id}" for one in files.experts if one.passage_id not in files.known]
    staged = store.catalog.staged()
    found += [] if staged is None else [f"half batch: {staged.id} is still staged"]
    found += [f"half audit: {one.id}" for one in store.catalog.audits.audits(finished=False)]
    return found + _stray_banks(store) if store.layout.has_tables else found


def _stray_banks(store: KnowledgeStore) -> list[str]:
    """Banks of no models that the store has or can go back to, and banks without a key."""
    settings = (store.catalog.setting("fingerprints"), store.catalog.setting("previous_models"))
    recorded, previous = cast(Any, settings)
    wanted = {bank_name(recorded)} | ({bank_name(previous["fingerprints"])} if previous else set())
    found = [f"orphan: bank {name}" for name in set(bank_names(str(store.layout.tables))) - wanted]
    keys = [(bank.name, bank._table.schema.field("id").metadata) for bank in store._tables.banks()]
    return found + [f"no key: bank {name}" for name, metadata in keys if not metadata]


def holders(folder: Path, needles: Sequence[bytes]) -> list[str]:
    """Files that hold bytes which were purged."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [f"purged bytes: {path}" for path in files if any(one in path.read_bytes() for one in needles)]


def _is_vector_of(store: KnowledgeStore, row: StoredRow) -> bool:
    ((vector, _),) = store.models.retriever.encode_passages([row.passage], [sentence_spans(row.passage.text)])
    return bool(np.allclose(vector, row.vector, atol=1e-5))


def _wrong_experts(store: KnowledgeStore, passages: Sequence[Passage], stored: Sequence[Any]) -> list[str]:
    from knowstore.experts import PassageInput

    if not passages:
        return []
    inputs = [PassageInput(one.title, one.text, tuple(sentence_spans(one.text))) for one in passages]
    made = store.models.generate([one.passage_id for one in passages], inputs, latent=stored[0].form == "latent")
    return [
        f"mixed up: expert {right.passage_id} is of another passage"
        for right, found in zip(made, stored, strict=True)
        if any(not np.allclose(right.tensors[name], found.tensors[name], atol=2e-2) for name in right.tensors)
    ]
