"""Disks and databases that fail under a store: an error that says so, never a wrong answer, and nothing lost."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from knowstore._loaded import LoadedModels
from knowstore.errors import CatalogError, KnowledgeStoreError, StoreLockedError
from knowstore.records import Passage
from knowstore.store import KnowledgeStore
from tests.faults.models import make_models
from tests.faults.scenes import Scene, open_store

Harm = Callable[[Path], object]


@pytest.fixture(scope="module")
def models(one_thread: None) -> LoadedModels:
    return make_models()


@pytest.fixture
def scene(tmp_path: Path, models: LoadedModels) -> Scene:
    return Scene.make(tmp_path / "scene", 0, models)


def seen(store: KnowledgeStore) -> tuple[list[str], list[str]]:
    listed = [one.passage_id for one in store.passages()]
    return listed, [one.passage_id for one in store.ask("Which town lies inland?").hits]


def test_a_locked_catalog_refuses_writers_and_lets_readers_read(
    scene: Scene, models: LoadedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knowstore.catalog.database.BUSY_TIMEOUT_S", 0.2)
    with open_store(scene.folder / "kb", models) as store:
        before = seen(store)
        other = sqlite3.connect(scene.folder / "kb" / "catalog.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreLockedError, match="locked"):
            store.add(scene.new)
        assert seen(store) == before
        other.execute("ROLLBACK")
        other.close()
        assert store.add(scene.new).n_added == len(scene.new)
        assert store.verify().clean


@pytest.mark.parametrize("at", [0, 4096, 20_000])
def test_a_corrupt_catalog_is_refused_and_left_as_it_is(at: int, scene: Scene, models: LoadedModels) -> None:
    path = scene.folder / "kb" / "catalog.sqlite"
    data = bytearray(path.read_bytes())
    data[at : at + 4096] = bytes(255 - byte for byte in data[at : at + 4096])
    path.write_bytes(data)

    def use() -> None:
        with open_store(scene.folder / "kb", models) as store:
            seen(store)
            store.add(scene.new)

    with pytest.raises(CatalogError, match=r"malformed|not a database"):
        use()
    assert path.read_bytes() == data


def _tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


HARMS: dict[str, Harm] = {"missing": Path.unlink, "torn": _tear}
PARTS = ("data", "_versions", "_transactions", "_deletions", "_indices")


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("table", ["passages", "experts"])
def test_a_harmed_file_of_a_table_is_reported_or_does_not_matter(
    table: str, harm: str, scene: Scene, models: LoadedModels, tmp_path: Path
) -> None:
    with open_store(scene.folder / "kb", models) as store:
        expected = seen(store)
    folder = scene.folder / "kb" / "tables" / f"{table}.lance"
    chosen = [max((folder / part).rglob("*.*"), key=lambda path: path.stat().st_mtime) for part in PARTS
              if any((folder / part).rglob("*.*"))]  # fmt: skip
    for path in chosen:
        whole = path.read_bytes()
        HARMS[harm](path)
        with suppress(KnowledgeStoreError), open_store(scene.folder / "kb", models) as store:
            assert seen(store) == expected, path
            store.verify()
        path.write_bytes(whole)
    with open_store(scene.folder / "kb", models) as store:
        assert (seen(store), store.verify().problems) == (expected, ())
        assert store.add([Passage("The last town lies nowhere.", "Last")]).n_added == 1


@pytest.mark.parametrize("table", ["passages", "experts"])
def test_a_table_that_has_lost_its_versions_is_not_taken_for_an_empty_store(
    table: str, scene: Scene, models: LoadedModels
) -> None:
    for path in (scene.folder / "kb" / "tables" / f"{table}.lance" / "_versions").iterdir():
        path.unlink()
    with open_store(scene.folder / "kb", models) as store:
        assert not store.verify().clean
        for use in (store.passages, lambda: store.ask("Which town?"), lambda: store.add(scene.new)):
            with pytest.raises(KnowledgeStoreError, match=r"cannot be read|no expert bank"):
                use()
