"""Stores that are shared: two writers, readers beside a writer, a catalog in PostgreSQL, catalogs of other stores."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text

from knowstore.bank import ExpertBank
from knowstore.catalog import Catalog, placements
from knowstore.config import ModelConfig
from knowstore.errors import CatalogError, ConfigError, KnowledgeStoreError, StoreLockedError, UnknownPassageError
from knowstore.passages import PassageTable
from knowstore.records import Passage
from knowstore.store import KnowledgeStore

Open = Callable[..., KnowledgeStore]
Write = Callable[[str, Sequence[Passage]], str]
Look = Callable[[KnowledgeStore], object]

_schema_numbers = itertools.count(1)


@pytest.fixture
def catalog_url(postgresql_url: str) -> str:
    """An empty schema of a PostgreSQL server."""
    name = f"store{next(_schema_numbers)}"
    engine = create_engine(make_url(postgresql_url).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {name}"))
    engine.dispose()
    return f"{postgresql_url}?options=-csearch_path%3D{name}"


def test_a_second_writer_is_refused_and_readers_go_on(open_store: Open, facts: list[Passage], tmp_path: Path) -> None:
    store, other = open_store(), open_store()
    store.add(facts[:2])
    with store.catalog.writer():
        for write in (
            lambda: other.add(facts[2:3]),
            lambda: other.remove([facts[0].passage_id]),
            lambda: other.replace(facts[0].passage_id, facts[2]),
            lambda: other.rollback(1),
            lambda: other.verify(repair=True),
        ):
            with pytest.raises(StoreLockedError, match="another writer"):
                write()
        assert len(other.ask("When was Rome founded?").experts) == 2
        assert other.verify().clean
        assert (len(other.passages()), other.export(tmp_path / "out")) == (2, 2)
    assert other.add(facts[2:3]).id == 2


def test_two_open_stores_see_and_build_on_what_the_other_wrote(
    open_store: Open, facts: list[Passage], visible: Look
) -> None:
    one, two = open_store(), open_store()
    one.add(facts[:2])
    two.add(facts[2:4])
    assert visible(one) == visible(two)
    one.remove([facts[2].passage_id])
    two.add([facts[2]])
    one.add([facts[4]])
    assert two.show(facts[4].passage_id).expert is not None
    two.remove([facts[4].passage_id], purge=True)
    one.add([facts[4]])
    one.remove([facts[0].passage_id])
    two.verify(repair=True)
    one.rollback(2)
    assert (visible(one), one.verify().problems) == (visible(two), ())
    assert {one.passage_id for one in two.passages()} == {one.passage_id for one in facts[:2]}


def test_readers_see_a_batch_of_another_process_entirely_or_not_at_all(
    open_store: Open,
    facts: list[Passage],
    write_facts: Write,
    tmp_path: Path,
    start_python: Callable[..., subprocess.Popen[str]],
) -> None:
    def version(number: int) -> list[Passage]:
        return [Passage(f"{one.text} This is version {number}.", one.title) for one in facts[:4]]

    store = open_store()
    paths = [write_facts("facts.jsonl", version(0))]
    store.ingest(paths)
    for number in range(1, 5):
        write_facts(f"next{number}.jsonl", version(number))
    writer = start_python(
        "import shutil\n"
        "store.models.llm, store.models.retriever, store.models.hypernetwork\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for number in range(1, 5):\n"
        "    shutil.copy(f'{sys.argv[1]}/next{number}.jsonl', f'{sys.argv[1]}/facts.jsonl')\n"
        "    store.ingest([f'{sys.argv[1]}/facts.jsonl'])\n",
        str(tmp_path),
    )
    try:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        store.ask("Rome?")
        writer.stdin.write("\n")
        writer.stdin.flush()
        seen: set[str] = set()
        while writer.poll() is None:
            for texts in (
                [hit.text for hit in store.retrieve("When was Rome founded?")],
                [hit.text for hit in store.ask("Where does Lyon lie?").experts],
                [one.passage.text for one in store.passages()],
            ):
                versions = {one.rsplit(" ", 1)[1] for one in texts}
                assert (len(texts), len(versions)) == (4, 1)
                seen |= versions
            assert store.verify().problems == ()
    finally:
        writer.kill()
        _, said = writer.communicate(timeout=60)
    assert writer.returncode == 0, said
    assert len(seen) > 1
    assert {hit.text.rsplit(" ", 1)[1] for hit in store.retrieve("Rome?")} == {"4."}
    assert store.verify().problems == ()


def _meanwhile(patch: pytest.MonkeyPatch, owner: type, name: str, happens: Callable[[], object]) -> None:
    """Let something happen, once, while `owner.name` is called: before it begins, or for `head` after it has ended."""
    original, still_to_come = getattr(owner, name), [happens]

    def called(self: object, *arguments: object, **options: object) -> object:
        result = original(self, *arguments, **options) if name == "head" else None
        if still_to_come:
            still_to_come.pop()()
        return result if name == "head" else original(self, *arguments, **options)

    patch.setattr(owner, name, called)


MOMENTS = {
    "after the catalog is read": (Catalog, "head"),
    "before the search": (PassageTable, "search_vector"),
    "between vector and text search": (PassageTable, "search_text"),
    "before the experts are read": (ExpertBank, "get"),
}


@pytest.mark.parametrize("is_same_object", [True, False], ids=["its own thread's", "another's"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_question_is_answered_from_one_state_while_batches_land(
    moment: str, is_same_object: bool, open_store: Open, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    writer = store if is_same_object else open_store()
    store.add(facts[:3])
    expected = store.ask("Where does Rome lie?")

    def land() -> None:
        writer.remove([facts[0].passage_id])
        writer.rollback(2)

    with monkeypatch.context() as patch:
        _meanwhile(patch, *MOMENTS[moment], land)
        answer = store.ask("Where does Rome lie?")
    assert writer.catalog.head() == 3
    assert [(hit.passage_id, hit.retrieval_score, hit.score) for hit in answer.hits] == [
        (hit.passage_id, hit.retrieval_score, hit.score) for hit in expected.hits
    ]
    assert len({hit.batch_id > 1 for hit in answer.hits if hit.passage_id == facts[0].passage_id}) == 1
    assert [one.weight for one in answer.experts] == [one.weight for one in expected.experts]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_purge_during_a_question_is_answered_from_the_state_after_it(
    moment: str, open_store: Open, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, writer = open_store(), open_store()
    store.add(facts[:3])
    with monkeypatch.context() as patch:
        _meanwhile(patch, *MOMENTS[moment], lambda: writer.remove([facts[0].passage_id], purge=True))
        answer = store.ask("Where does Rome lie?")
    assert {hit.passage_id for hit in answer.hits} == {one.passage_id for one in facts[1:3]}
    assert {one.passage_id for one in answer.experts} == {one.passage_id for one in facts[1:3]}


@pytest.mark.parametrize("use", ["show", "export", "verify"])
def test_a_purge_while_experts_are_read_is_seen_as_a_purge_and_not_as_damage(
    use: str, open_store: Open, facts: list[Passage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, writer = open_store(), open_store()
    store.add(facts[:3])
    with monkeypatch.context() as patch:
        _meanwhile(patch, ExpertBank, "iter_encoded", lambda: writer.remove([facts[0].passage_id], purge=True))
        match use:
            case "show":
                assert store.show(facts[1].passage_id).expert is not None
            case "export":
                assert store.export(tmp_path / "bundle") == 2
                assert open_store("copy").import_(tmp_path / "bundle").passages_added == 2
            case "verify":
                assert store.verify().problems == ()
    assert len(writer.passages()) == 2


def test_a_store_with_its_catalog_in_postgresql_works_the_same(
    open_store: Open, catalog_url: str, facts: list[Passage], write_facts: Write, visible: Look, tmp_path: Path
) -> None:
    states = []
    for folder, url in (("sqlite", None), ("postgresql", catalog_url)):
        store = open_store(folder, catalog_url=url)
        seen = [store.ingest([write_facts("facts.jsonl", facts[:4])]).passages_added, visible(store)]
        seen += [store.ingest([write_facts("facts.jsonl", facts[1:5])]).passages_superseded, visible(store)]
        store.replace(facts[1].passage_id, facts[5])
        seen += [visible(store), store.rollback(2).restored, visible(store)]
        store.remove([facts[0].passage_id], purge=True)
        seen += [visible(store), store.verify().problems, [(one.kind, one.n_added) for one in store.batches()]]
        with store.catalog.writer(), pytest.raises(StoreLockedError):
            open_store(folder, catalog_url=url).add(facts[5:])
        store.close()
        assert visible(open_store(folder, catalog_url=url)) == seen[-3]
        assert (tmp_path / folder / "catalog.sqlite").exists() == (url is None)
        states.append(seen)
    assert states[0] == states[1]


def _drop_connections(url: str) -> None:
    engine = create_engine(make_url(url.split("?")[0]).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        everyone_else = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        connection.execute(text(f"{everyone_else} AND datname = current_database()"))
    engine.dispose()


WRITES = {
    "while experts are written": (ExpertBank, "add"),
    "while passages are retired": (PassageTable, "retire"),
    "before the commit": (Catalog, "commit"),
}


@pytest.mark.parametrize("moment", WRITES)
def test_a_live_writer_keeps_the_store_when_its_connections_to_the_database_drop(
    moment: str, open_store: Open, catalog_url: str, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = (open_store("pg", catalog_url=catalog_url) for _ in range(2))
    store.add(facts[:2])

    def drop() -> None:
        _drop_connections(catalog_url)
        with pytest.raises(StoreLockedError):
            other.add(facts[3:4])

    with monkeypatch.context() as patch:
        _meanwhile(patch, *WRITES[moment], drop)
        try:
            store.replace(facts[0].passage_id, facts[2])
        except CatalogError:
            store.replace(facts[0].passage_id, facts[2])
    assert {one.passage_id for one in other.passages()} == {one.passage_id for one in facts[1:3]}
    assert (other.verify().problems, other.catalog.staged()) == ((), None)
    assert other.add(facts[3:4]).n_added == 1


def test_a_dropped_connection_within_the_commit_leaves_all_or_nothing(
    open_store: Open, catalog_url: str, facts: list[Passage], visible: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store("pg", catalog_url=catalog_url)
    store.add(facts[:2])
    before = visible(store)
    with monkeypatch.context() as patch:
        original = placements.apply

        def drop(*arguments: Any, **options: Any) -> None:
            original(*arguments, **options)
            _drop_connections(catalog_url)

        patch.setattr(placements, "apply", drop)
        with pytest.raises(CatalogError, match="connection"):
            store.replace(facts[0].passage_id, facts[2])
    assert (visible(store), store.verify().problems, store.catalog.staged()) == (before, (), None)
    store.replace(facts[0].passage_id, facts[2])
    assert {one.passage_id for one in store.passages()} == {one.passage_id for one in facts[1:3]}


def test_a_store_with_its_catalog_in_another_database_cannot_be_opened_without_it(
    open_store: Open, facts: list[Passage], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'elsewhere.sqlite'}"
    open_store("away", catalog_url=url).add(facts[:1])
    open_store("home").add(facts[1:2])
    assert len(open_store("away", catalog_url=url).passages()) == 1
    with pytest.raises(ConfigError, match="in another database"):
        open_store("away")
    with pytest.raises(ConfigError, match="in its folder"):
        open_store("home", catalog_url=url)


def test_a_catalog_of_another_store_is_refused(open_store: Open, facts: list[Passage], tmp_path: Path) -> None:
    urls = [f"sqlite:///{tmp_path / name}.sqlite" for name in ("one", "two")]
    for name, url in zip(("one", "two"), urls, strict=True):
        open_store(name, catalog_url=url).add(facts[:1])
    with pytest.raises(CatalogError, match="another store"):
        open_store("one", catalog_url=urls[1])
    with pytest.raises(CatalogError, match="another store"):
        open_store("new", catalog_url=urls[1])
    store = open_store("home")
    store.add(facts[:1])
    store.close()
    shutil.copytree(tmp_path / "home", tmp_path / "copy")
    assert len(open_store("copy").passages()) == 1


def test_of_new_stores_that_take_one_catalog_at_once_one_is_refused(
    open_store: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'one.sqlite'}"
    settle = Catalog.settle

    def be_second(self: Catalog, key: str, value: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(Catalog, "settle", settle)
            open_store("first", catalog_url=url)
        return settle(self, key, value)

    monkeypatch.setattr(Catalog, "settle", be_second)
    with pytest.raises(CatalogError, match="another store"):
        open_store("second", catalog_url=url)


def test_a_lost_catalog_is_not_taken_for_an_empty_one(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    store.add(facts[:2])
    store.close()
    for path in store.layout.folder.glob("catalog.sqlite*"):
        path.unlink()
    with pytest.raises(CatalogError, match="empty"):
        open_store()


@pytest.mark.parametrize(
    "described", ["", "{}", "[]", "null", "not json", '{"format": "x", "store_id": "a", "has_own_catalog": true}']
)
def test_a_damaged_description_of_a_store_is_refused(described: str, open_store: Open, tmp_path: Path) -> None:
    open_store().close()
    (tmp_path / "kb" / "store.json").write_text(described)
    with pytest.raises(ConfigError, match=r"store\.json"):
        open_store()


def test_a_store_of_a_newer_version_is_refused(open_store: Open, tmp_path: Path) -> None:
    open_store().close()
    path = tmp_path / "kb" / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ConfigError, match="newer version"):
        open_store()


def test_folders_that_are_no_store_are_left_alone(open_store: Open, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("hello")
    (tmp_path / "file").write_text("hello")
    for name in ("mine", "file", "file/below"):
        with pytest.raises(ConfigError):
            open_store(name)
    with pytest.raises(ConfigError, match="no store"):
        open_store("absent", create=False)
    assert not (tmp_path / "absent").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_sizes_are_told_while_files_come_and_go(open_store: Open, facts: list[Passage], tmp_path: Path) -> None:
    store = open_store()
    store.add(facts[:2])
    expected = store.stats().bytes["passages"]
    passing = tmp_path / "kb" / "tables" / "passages.lance" / "passing"
    is_over = threading.Event()

    def churn() -> None:
        while not is_over.is_set():
            passing.mkdir()
            for number in range(20):
                (passing / str(number)).touch()
            shutil.rmtree(passing)

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        try:
            assert {store.layout.size_bytes()["passages"] for _ in range(2_000)} == {expected}
        finally:
            is_over.set()
        churning.result()


@pytest.mark.parametrize("name", ["~", "~/kb", "memory:", "s3:kb", "notes:2024", "aside/../kb"])
def test_a_folder_is_a_folder_whatever_else_its_name_could_mean(
    name: str, open_store: Open, facts: list[Passage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    (tmp_path / "aside").symlink_to(tmp_path / "elsewhere" / "inner")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    store = open_store(name, is_relative=True)
    store.add(facts[:2])
    monkeypatch.chdir(tmp_path / "home")
    assert len(store.passages()) == 2
    store.add(facts[2:3])
    assert list((tmp_path / "home").iterdir()) == []
    assert (tmp_path / name / "tables").is_dir()
    assert store.verify().clean


@pytest.mark.parametrize("name", ["two\nlines", "bell\x07", "bytes\udcff"])
def test_a_folder_whose_name_the_tables_cannot_have_is_refused_and_not_made(
    name: str, open_store: Open, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="characters"):
        open_store(f"{name}/kb")
    assert list(tmp_path.iterdir()) == []


def test_damaged_tables_are_reported_as_such(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    store.add(facts[:2])
    store.close()
    for path in (store.layout.tables / "passages.lance").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\x00" * 10)
    store = open_store()
    for use in (lambda: store.ask("Rome?"), lambda: store.add(facts[2:3])):
        with pytest.raises(KnowledgeStoreError):
            use()
    assert not store.verify().clean


def test_a_reader_goes_on_with_a_bank_that_another_store_made_anew(open_store: Open, facts: list[Passage]) -> None:
    reading, mending = open_store(), open_store()
    reading.add(facts[:2])
    before = reading.ask("When was Rome founded?").text
    for path in (reading.layout.tables / "experts.lance" / "_versions").iterdir():
        path.unlink()
    assert mending.verify(repair=True).clean
    reading.forget()
    assert reading.ask("When was Rome founded?").text == before


def test_what_needs_no_model_is_done_without_their_files(
    open_store: Open, facts: list[Passage], tiny_models: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "llm"
    shutil.copytree(tiny_models.llm, moved)
    models = replace(tiny_models, llm=str(moved))
    store = open_store(models=models)
    store.add(facts[:2])
    with monkeypatch.context() as patch:
        patch.setattr("knowstore._upkeep.finish_purge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.remove([facts[0].passage_id], purge=True)
    store.close()
    shutil.rmtree(moved)
    for named in (models, None):
        assert open_store(models=named).verify().clean


def test_a_mistake_in_a_question_does_not_cost_what_is_in_memory(
    open_store: Open, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.add(facts[:2])
    store.ask("When was Rome founded?")
    opened: list[str] = []
    monkeypatch.setattr(PassageTable, "open", lambda *arguments, **_: opened.append(arguments[0]))
    with pytest.raises(UnknownPassageError), store.mount(["0" * 32]):
        pass
    assert opened == []


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_tables_of_a_beginning_are_gone_at_once_when_they_are_deleted(
    open_store: Open, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(folder: Path, **_: object) -> None:
        if folder.exists():
            max(folder.glob("experts.lance/_versions/*.manifest"), key=lambda file: file.stat().st_mtime_ns).unlink()
            for file in folder.glob("experts.lance/data/*.lance"):
                file.unlink()
            raise KeyboardInterrupt

    for name, what in (
        ("knowstore.catalog.Catalog.commit", interrupted),
        ("knowstore._layout.shutil.rmtree", cut_short),
    ):
        with open_store() as store, monkeypatch.context() as patch:
            patch.setattr(name, what)
            with pytest.raises(KeyboardInterrupt):
                store.add(facts[:2])
    store = open_store()
    assert store.verify().clean
    store.add(facts[:2])
    assert store.verify().clean
    assert not store.layout.discarded.exists()
