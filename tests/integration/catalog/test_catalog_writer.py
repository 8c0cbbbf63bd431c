from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from knowstore.catalog import Catalog, Change
from knowstore.errors import CatalogError, StoreLockedError

A = "a" * 32

HOLD = """
import sys, time
from knowstore.catalog import Catalog
catalog = Catalog.open(sys.argv[1])
with catalog.writer():
    catalog.stage("ingest", "from the other process")
    print("held", flush=True)
    time.sleep(60)
"""


COMMIT = """
import sys
from knowstore.catalog import Catalog, Change
catalog = Catalog.open(sys.argv[1])
for turn in range(10_000):
    with catalog.writer():
        batch = catalog.stage("add")
        catalog.commit(batch.id, Change(added=[(f"{turn * 500 + n:032x}", "x") for n in range(500)]))
    print(batch.id, flush=True)
"""


@contextmanager
def writing_process(url: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the writer lock and has staged a batch."""
    with subprocess.Popen([sys.executable, "-c", HOLD, url], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_writer_is_refused_and_told_who_holds_the_store(catalog: Catalog, url: str) -> None:
    with writing_process(url) as process:
        with pytest.raises(StoreLockedError) as caught, catalog.writer():
            pass
        assert f"pid {process.pid}" in caught.value.what
        assert "s3cret-word" not in str(caught.value)


def test_a_killed_writer_loses_the_lock_and_leaves_its_batch_staged(catalog: Catalog, url: str) -> None:
    with writing_process(url) as process:
        process.kill()
        process.wait()
        with catalog.writer(timeout_s=10):
            staged = catalog.staged()
            assert staged is not None
            assert staged.note == "from the other process"
            catalog.discard(staged.id)
            assert catalog.staged() is None


def test_a_process_killed_among_commits_leaves_whole_batches(catalog: Catalog, url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", COMMIT, url], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(5)]
        process.kill()
    with catalog.writer(timeout_s=10):
        batches = catalog.batches()
        assert {batch.id for batch in batches if batch.state == "live"} >= set(acknowledged)
        for batch in batches:
            assert len(catalog.batch_items(batch.id)["added"]) == (500 if batch.state == "live" else 0)


def test_a_writer_in_another_thread_is_refused(catalog: Catalog) -> None:
    errors: list[Exception] = []

    def try_writing() -> None:
        try:
            with catalog.writer():
                pass
        except StoreLockedError as error:
            errors.append(error)

    with catalog.writer():
        thread = threading.Thread(target=try_writing)
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_a_writer_inside_a_writer_is_refused(catalog: Catalog) -> None:
    with catalog.writer():
        with pytest.raises(StoreLockedError), catalog.writer(timeout_s=0.1):
            pass
        with pytest.raises(StoreLockedError), catalog.writer():
            pass


def test_a_writer_waits_for_its_turn(catalog: Catalog) -> None:
    held = threading.Event()

    def hold() -> None:
        with catalog.writer():
            held.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with catalog.writer(timeout_s=10):
        pass
    thread.join()


def test_the_lock_is_free_after_an_error_in_the_block(catalog: Catalog) -> None:
    with pytest.raises(ZeroDivisionError), catalog.writer():
        raise ZeroDivisionError
    with catalog.writer():
        pass


def test_readers_do_not_wait_for_a_writer(catalog: Catalog, url: str) -> None:
    batch = catalog.commit(catalog.stage("ingest").id, Change(added=[(A, "x")]))
    with writing_process(url), Catalog.open(url) as reader:
        started = time.perf_counter()
        assert reader.head() == batch.id
        assert reader.live_ids() == {A}
        assert time.perf_counter() - started < 5


def test_a_reader_does_not_wait_for_an_open_write_transaction(catalog: Catalog) -> None:
    with catalog._database.write() as connection:
        connection.exec_driver_sql("DELETE FROM settings")
        started = time.perf_counter()
        assert catalog.head() == 0
        assert time.perf_counter() - started < 5


def test_commits_from_many_threads_take_turns(catalog: Catalog) -> None:
    errors: list[Exception] = []

    def edit(number: int) -> None:
        try:
            for turn in range(5):
                with catalog.writer(timeout_s=30):
                    pair = (f"{number * 100 + turn:032x}", "x")
                    catalog.commit(catalog.stage("add").id, Change(added=[pair]))
                catalog.live_ids()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=edit, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert catalog.count_live() == 20
    assert [batch.state for batch in catalog.batches()] == ["live"] * 20


def test_two_stores_on_one_server_have_locks_of_their_own(new_url: Callable[[], str]) -> None:
    with Catalog.open(new_url()) as one, Catalog.open(new_url()) as other, one.writer(), other.writer():
        pass


def test_a_damaged_note_about_the_holder_does_not_matter(tmp_path: Path) -> None:
    with Catalog.open(tmp_path / "c.db") as catalog, catalog.writer():
        note = tmp_path / "c.db.lock.json"
        assert json.loads(note.read_text())["pid"] > 0
        note.write_text("{")
        with pytest.raises(StoreLockedError, match="another writer holds the store"), catalog.writer():
            pass
    assert not note.exists()


def test_a_lock_that_cannot_be_made_is_an_error_with_a_fix(tmp_path: Path) -> None:
    with Catalog.open(tmp_path / "c.db") as catalog:
        (tmp_path / "c.db.lock").unlink()
        (tmp_path / "c.db.lock").mkdir()
        with pytest.raises(CatalogError) as caught, catalog.writer():
            pass
        assert "writable" in caught.value.fix
