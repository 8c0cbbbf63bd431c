"""Stores that released versions wrote are opened, migrated and used; stores of newer versions are left alone.

`released/REVISION.tar.xz` is a store that the code of that schema revision wrote with the models of `tests.faults`:
batch 1 adds towns 1, 2 and 3, batch 2 replaces 2 by 4, batch 3 removes 1, batch 4 rolls that back, batch 5 purges 3,
and batch 6, which would have added 5, was cut short before its commit.
"""

from __future__ import annotations

import sqlite3
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from knowstore._loaded import LoadedModels
from knowstore.catalog import schema
from knowstore.cli.app import app
from knowstore.errors import SchemaError
from knowstore.records import Passage
from knowstore.store import KnowledgeStore
from tests.faults.checks import disagreements, leftovers
from tests.faults.models import make_models
from tests.faults.scenes import open_store

RELEASED = sorted(Path(__file__).with_name("released").glob("*.tar.xz"))


def town(number: int, source: str) -> Passage:
    return Passage(
        f"Town {number} lies {number} miles inland. It has a mill.", f"Town {number}", source, f"2024-05-0{number}"
    )


def titles(store: KnowledgeStore) -> set[str]:
    return {one.passage.title for one in store.passages()}


@pytest.fixture(scope="module")
def models(one_thread: None) -> LoadedModels:
    return make_models()


@pytest.fixture(params=RELEASED, ids=lambda path: path.name.split(".")[0])
def released(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a store as a released version left it."""
    with tarfile.open(request.param) as packed:
        packed.extractall(tmp_path, filter="data")
    return tmp_path / "kb"


def test_there_is_a_store_of_every_released_schema_but_the_newest() -> None:
    revisions = {path.name.split(".")[0] for path in RELEASED}
    assert revisions >= set(schema.known_revisions()) - {schema.head_revision()}
    assert "0001" in revisions


def test_a_store_of_a_released_version_is_migrated_and_clean_when_it_is_opened(
    released: Path, models: LoadedModels
) -> None:
    with open_store(released, models) as store:
        assert store.catalog.schema_current() == store.catalog.schema_head()
        assert store.catalog.check() == []
        assert store.verify().problems == ()
        assert disagreements(store) == []


def test_a_migrated_store_shows_and_answers_what_it_did(released: Path, models: LoadedModels) -> None:
    with open_store(released, models) as store:
        assert titles(store) == {"Town 1", "Town 4"}
        kinds = [(one.id, one.kind, one.state, one.n_added, one.n_removed) for one in reversed(store.batches())]
        assert kinds[:5] == [
            (1, "add", "live", 3, 0),
            (2, "replace", "live", 1, 1),
            (3, "remove", "live", 0, 1),
            (4, "rollback", "live", 1, 0),
            (5, "remove", "live", 0, 1),
        ]
        answer = store.ask("Which town lies 4 miles inland?")
        assert {hit.title for hit in answer.hits} == {one.title for one in answer.experts} == {"Town 1", "Town 4"}


def test_a_migrated_store_can_be_changed_and_rolled_back(released: Path, models: LoadedModels) -> None:
    with open_store(released, models) as store:
        store.add([town(5, "c"), town(3, "b")])
        assert titles(store) == {"Town 1", "Town 3", "Town 4", "Town 5"}
        assert leftovers(store) == []
        store.remove([town(5, "c").passage_id], purge=True)
        store.rollback(2)
        assert titles(store) == {"Town 1", "Town 2", "Town 3"}
        assert store.verify().problems == ()
        assert disagreements(store) == leftovers(store) == []


def test_a_store_of_a_newer_version_is_refused_and_not_touched(released: Path, models: LoadedModels) -> None:
    with sqlite3.connect(released / "catalog.sqlite") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    before = {path: path.read_bytes() for path in released.rglob("*") if path.is_file()}
    with pytest.raises(SchemaError, match="9999") as caught:
        open_store(released, models)
    assert "upgrade knowstore" in caught.value.fix
    for command in (["stats"], ["db", "upgrade"], ["db", "check"], ["verify", "--repair"]):
        done = CliRunner().invoke(app, ["--store", str(released), *command])
        assert done.exit_code != 0, command
    left = {path: path.read_bytes() for path in released.rglob("*") if path.is_file()}
    assert {path: data for path, data in left.items() if path in before} == before


def test_a_store_that_another_version_migrates_meanwhile_is_not_written_to(
    released: Path, models: LoadedModels
) -> None:
    with open_store(released, models) as store:
        before = store.batches()
        other = sqlite3.connect(released / "catalog.sqlite")
        other.execute("UPDATE alembic_version SET version_num = '9999'")
        other.commit()
        other.close()
        with pytest.raises(SchemaError, match="9999"):
            store.add([town(5, "c")])
        assert store.batches() == before
