"""Stores that can be read when nothing can be written: on disks and by users that may not, with work left undone; and
writers that find the store otherwise than they left it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from knowstore import KnowledgeStore, Passage
from knowstore._ingest import Sources
from knowstore._loaded import LoadedModels
from knowstore.errors import CatalogError, PassageError
from tests.faults.models import make_models
from tests.faults.scenes import open_store as open_with

Open = Callable[..., KnowledgeStore]
Write = Callable[[str, Sequence[Passage]], str]
_NOBODY = 65534


@pytest.fixture(scope="module")
def models(one_thread: None) -> LoadedModels:
    return make_models()


@contextmanager
def someone_who_may_only_read(folder: Path) -> Iterator[None]:
    """This process as one that can change nothing in a folder."""
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)
        for path in paths:
            path.chmod(0o755)


def test_a_store_can_be_read_where_nothing_can_be_written(models: LoadedModels, facts: list[Passage]) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # a test's own folder is closed to others
        kb = Path(name) / "kb"
        with open_with(kb, models) as store:
            store.add(facts)
        with someone_who_may_only_read(kb), open_with(kb, models) as store:
            assert len(store.passages()) == len(facts)
            assert store.ask("When was Rome founded?").hits
            assert store.verify().clean
            with pytest.raises(CatalogError, match="cannot be taken"):
                store.remove([facts[0].passage_id])
        with open_with(kb, models) as reading, open_with(kb, models) as writing:
            writing.remove([facts[0].passage_id])
            assert len(reading.passages()) == len(facts) - 1


def test_one_who_may_only_read_sees_what_is_committed_later(models: LoadedModels, facts: list[Passage]) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        kb = Path(name) / "kb"
        with open_with(kb, models) as store:
            store.add(facts[:2])
        with someone_who_may_only_read(kb):
            reading = open_with(kb, models)
            assert len(reading.passages()) == 2
        with open_with(kb, models) as store:
            store.add(facts[2:3])
        with someone_who_may_only_read(kb):
            assert len(reading.passages()) == 3
            reading.close()


def test_a_purge_that_cannot_be_finished_now_locks_nobody_out(
    open_store: Open, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.add(facts)

    def fail(*_: object) -> None:
        raise PassageError("the disk is full", kept="everything", fix="free some space")

    with monkeypatch.context() as patch:
        patch.setattr("knowstore.passages.table.delete_history", fail)
        with pytest.raises(PassageError, match="full"):
            store.remove([facts[0].passage_id], purge=True)
        reading = open_store()
        assert len(reading.passages()) == len(facts) - 1
        assert "unfinished purge" in {one.kind for one in reading.verify().problems}
        with pytest.raises(PassageError, match="full"):
            reading.remove([facts[1].passage_id])
    assert open_store().verify().clean


def test_a_catalog_that_is_older_than_the_tables_takes_no_edit_until_they_agree(
    open_store: Open, facts: list[Passage], tmp_path: Path
) -> None:
    with open_store() as store:
        store.add(facts[:3])
        path = store.layout.catalog_path
    backup = shutil.copy(path, tmp_path / "backup")
    with open_store() as store:
        store.add(facts[3:4])
        store.remove([facts[0].passage_id])
    shutil.copy(backup, path)

    store = open_store()
    assert len(store.passages()) == 3
    with pytest.raises(CatalogError, match="ends with edit batch 1, and 2 passages are marked by later ones"):
        store.add(facts[4:5])
    store.verify(repair=True)
    store.add(facts[4:5])
    assert store.verify().clean
    ids = {one.passage_id for one in (*facts[:3], facts[4])}
    assert {one.passage_id for one in store.passages()} == ids
    assert {hit.passage_id for hit in store.retrieve("When was Rome founded?")} <= ids


def test_an_ingest_does_not_commit_what_it_read_before_another_took_in_a_newer_version(
    open_store: Open, write_facts: Write, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = open_store(), open_store()
    source = write_facts("facts.jsonl", facts[:2])
    store.ingest([source])
    scan = Sources.scan
    n_scans = 0

    def scan_and_let_another_in(self: Sources, *arguments: Any, **options: Any) -> Any:
        nonlocal n_scans
        found = scan(self, *arguments, **options)
        n_scans += 1
        if n_scans == 1:
            with monkeypatch.context() as patch:
                patch.setattr(Sources, "scan", scan)
                write_facts("facts.jsonl", facts[:4])
                other.ingest([source])
        return found

    monkeypatch.setattr(Sources, "scan", scan_and_let_another_in)
    assert store.ingest([source]).batch_id is None
    assert n_scans == 2
    assert {one.passage_id for one in store.passages()} == {one.passage_id for one in facts[:4]}
