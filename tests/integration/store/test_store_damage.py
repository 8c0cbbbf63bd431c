"""Damage behind the store's back, in files, rows and the catalog: `verify` names it, `verify --repair` mends it where
the passages, their ids or the catalog tell what was there, and says what it cannot."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from lancedb.table import Table

from knowstore.bank import ExpertBank
from knowstore.config import ModelConfig
from knowstore.errors import CatalogError
from knowstore.passages import PassageTable
from knowstore.records import Passage
from knowstore.store import KnowledgeStore

Open = Callable[..., KnowledgeStore]
Damage = Callable[[KnowledgeStore, list[Passage]], None]

N_BATCHES = 3


@pytest.fixture(scope="module")
def pristine(
    facts: list[Passage], tiny_models: ModelConfig, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Facts 0 to 2 live; 3 was removed in the last of three batches."""
    folder = tmp_path_factory.mktemp("pristine") / "kb"
    with KnowledgeStore.open(folder, models=tiny_models, cache_dir=cache_dir) as opened:
        opened.add(facts[:2])
        opened.add(facts[2:4])
        opened.remove([facts[3].passage_id])
        assert opened.verify().problems == ()
    return folder


@pytest.fixture
def store(pristine: Path, tmp_path: Path, open_store: Open) -> KnowledgeStore:
    """A copy of it, to be damaged."""
    shutil.copytree(pristine, tmp_path / "kb")
    return open_store()


def _seen(store: KnowledgeStore) -> object:
    """What the catalog and a search show."""
    hits = [(hit.text, hit.title, hit.source, hit.date, hit.score) for hit in store.retrieve("When was Rome founded?")]
    passages = sorted(store.passages(), key=lambda one: one.passage_id)
    return sorted(store.catalog.live_placements()), store.batches(), passages, hits


def _table(store: KnowledgeStore, name: str) -> Table:
    return lancedb.connect(store.layout.tables).open_table(name)


def _change(table: Table, changed: dict[str, dict[str, object]]) -> None:
    """Overwrite columns of rows, by id, with nothing else."""
    rows = table.search().to_arrow().to_pylist()
    for row in rows:
        row.update(changed.get(row["id"], {}))
    table.add(pa.Table.from_pylist(rows, schema=table.schema), mode="overwrite")


def _swap(table: Table, first: str, second: str, columns: tuple[str, ...]) -> None:
    rows = {row["id"]: row for row in table.search().to_arrow().to_pylist()}
    _change(
        table,
        {
            first: {name: rows[second][name] for name in columns},
            second: {name: rows[first][name] for name in columns},
        },
    )


def _swap_passages(*columns: str) -> Damage:
    return lambda store, facts: _swap(_table(store, "passages"), facts[0].passage_id, facts[2].passage_id, columns)


def _swap_experts(*columns: str) -> Damage:
    return lambda store, facts: _swap(_table(store, "experts"), facts[0].passage_id, facts[2].passage_id, columns)


def _set_passage(**values: Any) -> Damage:
    return lambda store, facts: _change(_table(store, "passages"), {facts[0].passage_id: values})


def _flip_text_bit(store: KnowledgeStore, facts: list[Passage]) -> None:
    data = bytearray(facts[0].text.encode())
    data[5] ^= 4
    _change(_table(store, "passages"), {facts[0].passage_id: {"text": data.decode()}})


def _drop_index(store: KnowledgeStore, _facts: list[Passage]) -> None:
    table = _table(store, "passages")
    table.drop_index(next(index.name for index in table.list_indices() if index.columns == ["text"]))


def _overwrite(pattern: str, keep: float) -> Damage:
    """Cut every file that matches and zero what is left of its middle."""

    def damage(store: KnowledgeStore, _facts: list[Passage]) -> None:
        for file in store.layout.tables.glob(pattern):
            data = bytearray(file.read_bytes())
            for place in range(len(data) // 4, len(data) // 2):
                data[place] ^= 0x55
            file.write_bytes(bytes(data)[: int(len(data) * keep)])

    return damage


def _sql(statement: str, *, keys: bool = True) -> Damage:
    def damage(store: KnowledgeStore, facts: list[Passage]) -> None:
        with closing(sqlite3.connect(store.layout.catalog_path)) as connection:
            connection.execute(f"PRAGMA foreign_keys = {'ON' if keys else 'OFF'}")
            connection.execute(statement.format(live=facts[0].passage_id, removed=facts[3].passage_id))
            connection.commit()

    return damage


def _widen(store: KnowledgeStore, facts: list[Passage]) -> None:
    """An expert of twice the LLM's width, sealed like every other."""
    bank = ExpertBank.open(str(store.layout.tables), fingerprint=store.models.fingerprints["experts"])
    (expert,) = bank.get([facts[0].passage_id]).values()
    up, down = (np.ones(shape, np.float32) for shape in ((64, expert.rank), (expert.rank, 64)))
    bank.add([replace(expert, tensors={"up": up, "down": down})], "float32", batch_id=1)


MENDED: dict[str, tuple[Damage, set[str]]] = {
    "swapped texts": (_swap_passages("text", "title", "date"), {"damaged passage"}),
    "swapped ids": (_swap_passages("id"), {"damaged passage"}),
    "swapped vectors": (_swap_passages("vector", "segment_vectors", "segments"), {"damaged passage"}),
    "swapped vectors with checksum": (
        _swap_passages("vector", "segment_vectors", "segments", "checksum"), {"damaged passage"},
    ),
    "swapped tensors": (_swap_experts("tensors"), {"damaged expert"}),
    "swapped tensors with checksum": (
        _swap_experts("tensors", "checksum", "rank", "segment_ranks"), {"damaged expert"},
    ),
    "flipped bit of a text": (_flip_text_bit, {"damaged passage"}),
    "other vector": (_set_passage(vector=[0.5] * 32), {"damaged passage"}),
    "torn segment vectors": (_set_passage(segment_vectors=b"abc"), {"damaged passage"}),
    "odd spans": (_set_passage(segments=[0, 5, 6]), {"damaged passage"}),
    "flipped bit of a date": (_set_passage(date="2020-01-03"), {"damaged passage"}),
    "other source": (_set_passage(source="nowhere"), {"wrong source"}),
    "lost full-text index": (_drop_index, {"damaged index"}),
    "damaged full-text index": (_overwrite("passages.lance/_indices/*/*.lance", 0.9), {"damaged index"}),
    "torn experts": (_overwrite("experts.lance/data/*.lance", 0.7), {"unreadable experts"}),
    "torn manifest of experts": (_overwrite("experts.lance/_versions/*.manifest", 0.5), {"unreadable experts"}),
    "lost placement": (
        _sql("DELETE FROM placements WHERE passage_id = '{live}'"), {"orphan passage", "wrong counts"},
    ),
    "lost placement of a removed one": (
        _sql("DELETE FROM placements WHERE passage_id = '{removed}'"), {"orphan passage", "wrong counts"},
    ),
    "expert of another width": (_widen, {"damaged expert"}),
    "batch given up": (_sql("UPDATE edit_batches SET state = 'discarded' WHERE id = 2"), {"wrong batch state"}),
    "wrong counts": (_sql("UPDATE edit_batches SET n_added = 77 WHERE id = 1"), {"wrong counts"}),
    "damaged fingerprints": (
        _sql("UPDATE settings SET value = '{{\"experts\": \"x\"}}' WHERE key = 'fingerprints'"), {"damaged setting"},
    ),
    "torn fingerprints": (
        _sql("UPDATE settings SET value = '{{' WHERE key = 'fingerprints'"), {"damaged setting"},
    ),
    "purge of a live passage": (_sql("INSERT INTO purges VALUES ('{live}', 3)"), {"wrong purge"}),
}  # fmt: skip


@pytest.mark.parametrize("damage", MENDED)
def test_planted_damage_is_named_and_mended(
    damage: str, store: KnowledgeStore, facts: list[Passage], open_store: Open
) -> None:
    before = _seen(store)
    plant, kinds = MENDED[damage]
    plant(store, facts)
    fresh = open_store()
    report = fresh.verify()
    assert {problem.kind for problem in report.problems} >= kinds
    assert all("verify --repair" in one.fix for one in report.problems if one.kind in kinds)
    assert fresh.verify(repair=True).problems == ()
    assert _seen(fresh) == before
    assert fresh.rollback(N_BATCHES).restored == 1
    assert (fresh.verify().problems, len(fresh.passages())) == ((), 4)


def _tear_passages(store: KnowledgeStore, facts: list[Passage]) -> None:
    """Facts 0 in one file, which is torn, and the others in another."""
    table = _table(store, "passages")
    rows = table.search().to_arrow().to_pylist()
    first = [row for row in rows if row["id"] == facts[0].passage_id]
    table.add(pa.Table.from_pylist(first, schema=table.schema), mode="overwrite")
    newest = max((store.layout.tables / "passages.lance" / "data").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    table.add(pa.Table.from_pylist([row for row in rows if row not in first], schema=table.schema))
    newest.write_bytes(newest.read_bytes()[:100])


LOST: dict[str, tuple[Damage, set[str]]] = {
    "text of many flipped bits": (_set_passage(text="Nobody wrote this."), {"damaged passage"}),
    "torn file of passages": (_tear_passages, {"unreadable passages"}),
}


@pytest.mark.parametrize("damage", LOST)
def test_a_text_that_is_lost_is_taken_out_and_named_and_the_rest_is_mended(
    damage: str, store: KnowledgeStore, facts: list[Passage], open_store: Open
) -> None:
    plant, kinds = LOST[damage]
    plant(store, facts)
    fresh = open_store()
    assert {problem.kind for problem in fresh.verify().problems} >= kinds
    left = fresh.verify(repair=True).problems
    assert left
    assert {problem.kind for problem in left} == {"missing passage"}
    assert facts[0].passage_id in " ".join(problem.detail for problem in left)
    assert facts[2].text in [hit.text for hit in fresh.retrieve("Where does Lyon lie?")]
    for problem in left:
        fresh.remove([problem.detail.split()[1]])
    fresh.add([facts[0]])
    assert (fresh.verify().problems, len(fresh.passages())) == ((), 3)


def test_a_date_that_cannot_be_told_is_taken_out_and_named(
    store: KnowledgeStore, facts: list[Passage], open_store: Open
) -> None:
    _set_passage(date="1999-12-31")(store, facts)
    fresh = open_store()
    assert {"damaged passage"} <= {problem.kind for problem in fresh.verify().problems}
    report = fresh.verify(repair=True)
    assert ([problem.kind for problem in report.problems], report.clean) == (["lost date"], False)
    assert (fresh.verify().problems, fresh.passages()[0].passage.date) == ((), "")
    [lost] = report.problems
    assert f"remove {fresh.passages()[0].passage_id} --purge" in lost.fix
    [dated] = [one for one in facts if one.passage_id == fresh.passages()[0].passage_id]
    fresh.remove([dated.passage_id], purge=True)
    fresh.add([dated])
    assert dated.date in {stored.passage.date for stored in fresh.passages()} - {""}


@pytest.mark.parametrize("files", ["_versions/*.manifest", "data/*.lance"])
def test_a_passages_table_of_which_nothing_can_be_read_is_named_with_what_to_do(
    files: str, store: KnowledgeStore, facts: list[Passage], open_store: Open
) -> None:
    _overwrite(f"passages.lance/{files}", 0.5)(store, facts)
    fresh = open_store()
    for report in (fresh.verify(), fresh.verify(repair=True)):
        assert {problem.kind for problem in report.problems} == {"unreadable passages"}
    assert "backup" in report.problems[0].fix


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _turned(data: bytes) -> bytes:
    """With every bit of the first third turned over, where the indexes keep their vectors and ids."""
    third = len(data) // 3
    return bytes(byte ^ 0xFF for byte in data[:third]) + data[third:]


SPOILED = [
    ("passages.lance/_indices/*/*.idx", _cut), ("passages.lance/_indices/*/*.idx", None),
    ("passages.lance/_indices/*/auxiliary.idx", _turned), ("experts.lance/_indices/*/page_*.lance", _cut),
    ("experts.lance/_indices/*/page_*.lance", None), ("experts.lance/_indices/*/page_data.lance", _turned),
]  # fmt: skip


@pytest.mark.parametrize(("files", "spoil"), SPOILED)
def test_damaged_indexes_of_vectors_and_of_experts_are_named_and_built_anew(
    files: str,
    spoil: Callable[[bytes], bytes] | None,
    facts: list[Passage],
    open_store: Open,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PassageTable, "ann_rows", 1)
    monkeypatch.setattr("knowstore.bank.bank._ID_INDEX_ROWS", 1)
    store = open_store()
    store.add(facts)
    before = _seen(store)
    assert store.verify().problems == ()
    found = list(store.layout.tables.glob(files))
    assert found
    for file in found:
        if spoil is None:
            file.unlink()
        else:
            file.write_bytes(spoil(file.read_bytes()))
    fresh = open_store()
    report = fresh.verify()
    assert {(one.kind, "verify --repair" in one.fix) for one in report.problems} == {("damaged index", True)}
    assert fresh.verify(repair=True).problems == ()
    repaired = open_store()
    assert (_seen(repaired), repaired.verify().problems) == (before, ())
    assert repaired.ask("When was Rome founded?").experts


def test_an_index_of_vectors_that_is_needed_no_longer_goes_when_it_is_damaged(
    facts: list[Passage], open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PassageTable, "ann_rows", 1)
    store = open_store()
    store.add(facts)
    for file in store.layout.tables.glob("passages.lance/_indices/*/*.idx"):
        file.unlink()
    monkeypatch.setattr(PassageTable, "ann_rows", 100)
    fresh = open_store()
    assert {problem.kind for problem in fresh.verify().problems} == {"damaged index"}
    assert fresh.verify(repair=True).problems == ()
    assert len(open_store().retrieve("When was Rome founded?")) == len(facts)


def test_a_table_without_checksums_is_read_and_verified(
    store: KnowledgeStore, facts: list[Passage], open_store: Open
) -> None:
    before = _seen(store)
    _table(store, "passages").drop_columns(["checksum"])
    old = open_store()
    assert (old.verify().problems, _seen(old)) == ((), before)
    old.add([facts[4]])
    assert old.verify().problems == ()
    _swap_passages("text", "title")(store, facts)
    assert {problem.kind for problem in open_store().verify().problems} >= {"damaged passage"}


def test_models_that_the_catalog_cannot_name_any_more_are_an_error_with_a_way_out(
    store: KnowledgeStore, facts: list[Passage], tiny_models: ModelConfig, cache_dir: Path
) -> None:
    _sql("UPDATE settings SET value = '{{\"llm\": 1, \"nonsense\": 2}}' WHERE key = 'models'")(store, facts)
    with pytest.raises(CatalogError, match="--llm"):
        KnowledgeStore.open(store.layout.folder, cache_dir=cache_dir)
    with KnowledgeStore.open(store.layout.folder, models=tiny_models, cache_dir=cache_dir) as opened:
        assert len(opened.passages()) == 3


@pytest.mark.parametrize("key", ["purge_pending", "fingerprints"])
def test_a_setting_that_cannot_be_read_is_named_and_stops_no_verification(
    key: str, store: KnowledgeStore, facts: list[Passage]
) -> None:
    _sql(f"INSERT OR REPLACE INTO settings VALUES ('{key}', '{{{{')")(store, facts)
    _sql("UPDATE fingerprints SET kind = 'llm'")(store, facts)  # nothing tells any more what they were
    for report in (store.verify(), store.verify(repair=True)):
        assert (report.clean, {problem.kind for problem in report.problems}) == (False, {"damaged setting"})
        assert key in " ".join(problem.detail for problem in report.problems)
    with pytest.raises(CatalogError, match=key):
        KnowledgeStore.open(store.layout.folder, models=store.models.config).ask("When was Rome founded?")


def test_torn_names_of_models_are_an_error_with_a_way_out(store: KnowledgeStore, facts: list[Passage]) -> None:
    _sql("UPDATE settings SET value = '{{' WHERE key = 'models'")(store, facts)
    with pytest.raises(CatalogError, match="models") as raised:
        KnowledgeStore.open(store.layout.folder)
    assert "--llm" in raised.value.fix
    assert {problem.kind for problem in store.verify().problems} == {"damaged setting"}
