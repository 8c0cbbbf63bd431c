from __future__ import annotations

import logging
import os
import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from knowstore.catalog import Catalog, Change
from knowstore.errors import CatalogError, ConfigError, SchemaError, StoreLockedError

A = "a" * 32


def execute(catalog: Catalog, statement: str) -> None:
    with catalog._database.write() as connection:
        connection.exec_driver_sql(statement)


def test_opening_an_empty_database_brings_it_to_the_head(catalog: Catalog) -> None:
    assert catalog.schema_current() == catalog.schema_head()
    assert catalog.check() == []


def test_migrating_again_changes_nothing(catalog: Catalog, url: str) -> None:
    catalog.commit(catalog.stage("ingest").id, Change(added=[(A, "x")]))
    catalog.upgrade()
    with Catalog.open(url) as again:
        assert again.live_ids() == {A}


def test_a_database_can_be_opened_without_migrating(new_url: Callable[[], str]) -> None:
    url = new_url()
    if url.startswith("sqlite"):
        Path(url.removeprefix("sqlite:///")).touch()
    with Catalog.open(url, migrate=False) as catalog:
        assert catalog.schema_current() is None
        with pytest.raises(SchemaError) as caught:
            catalog.head()
        assert "knowstore db upgrade" in caught.value.fix
        catalog.upgrade()
        assert catalog.schema_current() == catalog.schema_head()
        assert catalog.head() == 0


def test_a_newer_schema_is_refused_and_not_touched(catalog: Catalog, url: str) -> None:
    execute(catalog, "UPDATE alembic_version SET version_num = '9999'")
    for migrate in (True, False):
        with pytest.raises(SchemaError) as caught:
            Catalog.open(url, migrate=migrate)
        assert "9999" in caught.value.what
        assert catalog.schema_head() in caught.value.what
        assert "s3cret-word" not in str(caught.value)


def test_check_names_what_differs(catalog: Catalog) -> None:
    execute(catalog, "DROP TABLE purges")
    execute(catalog, "ALTER TABLE settings ADD COLUMN extra TEXT")
    execute(catalog, "CREATE TABLE of_somebody_else (id INTEGER)")
    found = catalog.check()
    assert len(found) == 2
    assert any("add_table" in line and "purges" in line for line in found)
    assert any("remove_column" in line and "extra" in line for line in found)


def test_a_migration_that_fails_leaves_the_database_as_it_was(new_url: Callable[[], str]) -> None:
    url = new_url()
    with Catalog.open(url) as catalog:
        for table in ("audit_answers", "audits", "probes", "fingerprints", "purges", "placements", "edit_batches"):
            execute(catalog, f"DROP TABLE {table}")
        execute(catalog, "DELETE FROM alembic_version")
    with pytest.raises(CatalogError, match="already exists"):
        Catalog.open(url)
    with Catalog.open(url, migrate=False) as catalog:
        assert catalog.schema_current() is None
        with pytest.raises(SchemaError):
            catalog.head()


def test_a_schema_is_not_migrated_under_a_writer(new_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knowstore.catalog.catalog.MIGRATION_WAIT_S", 0.0)
    url = new_url()
    if url.startswith("sqlite"):
        Path(url.removeprefix("sqlite:///")).touch()
    with Catalog.open(url, migrate=False) as catalog, catalog.writer():
        with pytest.raises(StoreLockedError):
            Catalog.open(url)
        assert catalog.schema_current() is None


OPEN = """
import sys
from knowstore.catalog import Catalog
print("ready", flush=True)
sys.stdin.readline()
with Catalog.open(sys.argv[1]) as catalog:
    assert catalog.check() == []
"""


def test_processes_that_open_a_new_database_at_once_all_succeed(url: str) -> None:
    command = [sys.executable, "-W", "error", "-c", OPEN, url]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[1] for process in processes] == [""] * 3


def test_a_new_database_that_another_is_writing_to_is_waited_for(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "c.db", isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")  # SQLite refuses at once to begin a log beside it
        written = threading.Timer(0.3, lambda: other.execute("COMMIT"))
        written.start()
        with Catalog.open(tmp_path / "c.db") as catalog:
            assert catalog.schema_current() == catalog.schema_head()
        written.join()


def test_threads_that_open_a_new_database_at_once_all_succeed(url: str) -> None:
    errors: list[Exception] = []

    def open_once() -> None:
        try:
            with Catalog.open(url) as catalog:
                catalog.head()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=open_once) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_relative_path_means_the_folder_at_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Catalog.open("sqlite:///c.db") as catalog:
        monkeypatch.chdir("/")
        catalog.stage("ingest")
    assert (tmp_path / "c.db").exists()


@pytest.mark.parametrize("name", ["with space.db", "100%.db", "a?b#c.db", "ü'\".db", "%41.db"])
def test_a_path_may_have_any_characters(tmp_path: Path, name: str) -> None:
    with Catalog.open(tmp_path / name) as catalog, catalog.writer():
        catalog.stage("ingest")
    assert (tmp_path / name).exists()


def test_sqlite_keeps_a_log_and_enforces_foreign_keys(tmp_path: Path) -> None:
    with Catalog.open(tmp_path / "c.db") as catalog:
        with catalog._database.read() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        with pytest.raises(CatalogError, match="FOREIGN KEY"):
            execute(catalog, f"INSERT INTO purges VALUES ('{A}', 99)")


def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.db").write_bytes(b"this is a text file, not a database" * 50)
    with pytest.raises(CatalogError, match="not a database") as caught:
        Catalog.open(tmp_path / "c.db")
    assert "backup" in caught.value.fix
    assert (tmp_path / "c.db").read_bytes().startswith(b"this is a text")


def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    with Catalog.open(tmp_path / "c.db") as catalog:
        catalog.commit(catalog.stage("ingest").id, Change(added=[(f"{n:032x}", "x") for n in range(500)]))
    data = bytearray((tmp_path / "c.db").read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    (tmp_path / "c.db").write_bytes(data)
    with pytest.raises(CatalogError) as caught, Catalog.open(tmp_path / "c.db") as catalog:
        catalog.live_ids()
    assert "backup" in caught.value.fix


def test_on_a_disk_on_which_sqlite_cannot_even_begin_a_catalog_is_read_and_what_fails_is_named(tmp_path: Path) -> None:
    with Catalog.open(tmp_path / "catalog.db") as catalog:
        catalog.set_setting("k", "v")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))  # as on a full disk, its shared memory finds no place
    try:
        with Catalog.open(tmp_path / "catalog.db") as catalog:
            assert catalog.setting("k") == "v"
            with pytest.raises(CatalogError, match="disk I/O error") as raised:
                catalog.set_setting("k", "w")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "disk space" in raised.value.fix


def test_a_folder_that_does_not_exist_or_a_path_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "c.db", tmp_path):
        with pytest.raises(CatalogError) as caught:
            Catalog.open(path)
        assert "folder" in caught.value.fix


def test_opening_without_migrating_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="there is no catalog"):
        Catalog.open(tmp_path / "c.db", migrate=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "catalog.db",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite://user:s3cret@host/c.db",
        "sqlite:///a%00b.db",
        "postgresql://u:s3cret@h/\ud800",
        "sqlite:///file:c.db?uri=true",
        "sqlite:///c.db?mode=ro",
        "mysql://u:s3cret-word@h/d",
        "postgresql://u:s3cret-word@h:port/d",
        "postgresql://u:word@s3cret@h/d",
        "postgresql://u:word@h2:5/s3cret@h/d",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Catalog.open(url)
    assert "sqlite:///path" in caught.value.fix
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_passwords_are_in_no_message_and_no_log(
    postgresql_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    for wrong in (
        postgresql_url.replace("s3cret-word", "other-s3cret"),
        postgresql_url + "?password=other-s3cret",
        postgresql_url.replace("/postgres", "/nowhere"),
        "postgresql://u:s3cret-word@127.0.0.1:1/d",
    ):
        with pytest.raises(CatalogError) as caught:
            Catalog.open(wrong)
        assert "user and password" in caught.value.fix
        assert "s3cret" not in str(caught.value)
        assert "***" in caught.value.what
    with Catalog.open(postgresql_url) as catalog:
        assert catalog.schema_current() == catalog.schema_head()
    assert "s3cret" not in caplog.text


def test_a_missing_driver_says_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError) as caught:
        Catalog.open("postgresql://u:s3cret-word@h/d")
    assert "knowstore[postgres]" in caught.value.fix
    assert "s3cret" not in str(caught.value)
