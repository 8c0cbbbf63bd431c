"""Crashes at each step of a write: the edit batch is there entirely or not at all, and the command can be run again."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from knowstore.bank import ExpertBank
from knowstore.catalog import Catalog
from knowstore.passages import PassageTable
from knowstore.records import Passage
from knowstore.store import KnowledgeStore

Open = Callable[..., KnowledgeStore]
Write = Callable[[str, Sequence[Passage]], str]
Look = Callable[[KnowledgeStore], object]

WRITING = {
    "after the experts are written": (ExpertBank, "add", True),
    "after the passages are written": (PassageTable, "add", True),
    "after passages are revived": (PassageTable, "revive", True),
    "after passages are retired": (PassageTable, "retire", True),
    "after the tables are tidied": (ExpertBank, "optimize", True),
    "before the commit": (Catalog, "commit", False),
    "after the commit": (Catalog, "commit", True),
}
PURGING = {
    "after the removal is committed": (Catalog, "commit", True),
    "after the purge is recorded": (PassageTable, "purge", False),
    "after the passages are purged": (PassageTable, "purge", True),
    "before the experts are purged": (ExpertBank, "purge", False),
    "after the experts are purged": (ExpertBank, "purge", True),
    "before the purge is noted": (Catalog, "record_purge", False),
    "after the purge is noted": (Catalog, "record_purge", True),
}


class Crash(BaseException):
    """Stands for the end of the process: nothing handles it, but for locks that the system would free."""


def _crash_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, is_done: bool) -> None:
    original = getattr(owner, name)

    def crash(self: object, *arguments: Any, **options: Any) -> object:
        if is_done:
            original(self, *arguments, **options)
        raise Crash

    monkeypatch.setattr(owner, name, crash)


@pytest.fixture
def prepared(open_store: Open, write_facts: Write, facts: list[Passage]) -> str:
    """A store of facts 0 to 2, of which 3 was removed; the file then holds 0, 3 (to be revived) and 4 (new)."""
    store = open_store()
    store.ingest([write_facts("facts.jsonl", facts[:4])])
    store.ingest([write_facts("facts.jsonl", facts[:3])])
    store.close()
    return write_facts("facts.jsonl", [facts[0], facts[3], facts[4]])


@pytest.fixture
def expected(open_store: Open, write_facts: Write, facts: list[Passage], prepared: str, visible: Look) -> list[object]:
    """What is visible before and after the ingest that crashes."""
    store = open_store("untroubled")
    store.ingest([write_facts("facts.jsonl", facts[:4])])
    store.ingest([write_facts("facts.jsonl", facts[:3])])
    before = visible(store)
    store.ingest([write_facts("facts.jsonl", [facts[0], facts[3], facts[4]])])
    return [before, visible(store)]


@pytest.mark.parametrize("step", WRITING)
def test_an_ingest_that_crashed_is_there_entirely_or_not_at_all_and_can_be_run_again(
    step: str, open_store: Open, prepared: str, expected: list[object], visible: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    with monkeypatch.context() as patch:
        _crash_at(patch, *WRITING[step])
        with pytest.raises(Crash):
            store.ingest([prepared])
    store.close()
    store = open_store()
    assert visible(store) == expected[step == "after the commit"]
    assert store.verify().clean
    report = store.ingest([prepared])
    assert (report.batch_id is None) == (step == "after the commit")
    assert (visible(store), store.verify().problems) == (expected[1], ())
    store.rollback(3)
    assert (visible(store), store.verify().problems) == (expected[0], ())


@pytest.mark.parametrize("step", WRITING)
def test_another_command_discards_what_a_crashed_ingest_left(
    step: str,
    open_store: Open,
    prepared: str,
    expected: list[object],
    facts: list[Passage],
    visible: Look,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = open_store()
    with monkeypatch.context() as patch:
        _crash_at(patch, *WRITING[step])
        with pytest.raises(Crash):
            store.ingest([prepared])
    store.close()
    store = open_store()
    batch = store.add([facts[5]])
    assert store.verify().problems == ()
    live = {passage_id for passage_id in store.catalog.live_ids() if passage_id != facts[5].passage_id}
    kept = [facts[0], facts[3], facts[4]] if step == "after the commit" else facts[:3]
    assert live == {passage.passage_id for passage in kept}
    store.rollback(batch.id)
    assert (visible(store), store.verify().problems) == (expected[step == "after the commit"], ())
    assert [one.state for one in store.batches() if one.state == "staged"] == []


def test_an_ingest_of_other_files_takes_back_what_a_crashed_one_retired_and_revived(
    open_store: Open,
    prepared: str,
    expected: list[object],
    write_facts: Write,
    facts: list[Passage],
    visible: Look,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = open_store()
    with monkeypatch.context() as patch:
        _crash_at(patch, *WRITING["before the commit"])
        with pytest.raises(Crash):
            store.ingest([prepared])
    report = store.ingest([write_facts("other.jsonl", [facts[5]])])
    assert (report.passages_added, report.passages_superseded) == (1, 0)
    assert store.verify().problems == ()
    assert {one.passage_id for one in store.passages()} == {one.passage_id for one in [*facts[:3], facts[5]]}
    store.rollback(2)
    assert {one.passage_id for one in store.passages()} == {one.passage_id for one in facts[:4]}
    assert store.verify().problems == ()


@pytest.mark.parametrize("step", [step for step in WRITING if "revived" not in step])
def test_a_replacement_that_crashed_is_there_entirely_or_not_at_all_and_can_be_run_again(
    step: str, open_store: Open, facts: list[Passage], visible: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.add(facts[:2])
    before = visible(store)
    with monkeypatch.context() as patch:
        _crash_at(patch, *WRITING[step])
        with pytest.raises(Crash):
            store.replace(facts[0].passage_id, facts[2])
    store.close()
    store = open_store()
    assert store.verify().clean
    if step == "after the commit":
        assert {one.passage_id for one in store.passages()} == {facts[1].passage_id, facts[2].passage_id}
        return
    assert visible(store) == before
    store.replace(facts[0].passage_id, facts[2])
    assert {one.passage_id for one in store.passages()} == {facts[1].passage_id, facts[2].passage_id}
    assert (store.verify().problems, store.stats().experts) == ((), 3)


@pytest.mark.parametrize("step", ["after passages are retired", "after passages are revived", "before the commit"])
def test_a_rollback_that_crashed_can_be_run_again(
    step: str, open_store: Open, facts: list[Passage], visible: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.add(facts[:2])
    before = visible(store)
    store.replace(facts[0].passage_id, facts[2])
    after = visible(store)
    with monkeypatch.context() as patch:
        _crash_at(patch, *WRITING[step])
        with pytest.raises(Crash):
            store.rollback(2)
    store.close()
    store = open_store()
    assert (visible(store), store.verify().problems) == (after, ())
    assert store.rollback(2).restored == 1
    assert (visible(store), store.verify().problems) == (before, ())


@pytest.mark.parametrize("step", PURGING)
def test_a_purge_that_crashed_is_finished_by_the_next_write(
    step: str, open_store: Open, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.add(facts[:3])
    folder, needle = store.layout.folder, b"slopes of Pichincha"
    store.add([facts[5]])
    assert _holders(folder, needle)
    with monkeypatch.context() as patch:
        _crash_at(patch, *PURGING[step])
        with pytest.raises(Crash):
            store.remove([facts[5].passage_id], purge=True)
    store.close()
    store = open_store()
    assert facts[5].passage_id not in {one.passage_id for one in store.passages()}
    store.add([facts[4]])
    assert _holders(folder, needle) == []
    assert store.verify().problems == ()
    assert store.add([facts[5]]).n_added == 1
    assert store.verify().problems == ()


@pytest.mark.parametrize("step", PURGING)
def test_a_purge_that_crashed_can_be_run_again(
    step: str, open_store: Open, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.add(facts)
    with monkeypatch.context() as patch:
        _crash_at(patch, *PURGING[step])
        with pytest.raises(Crash):
            store.remove([facts[5].passage_id], purge=True)
    assert store.remove([facts[5].passage_id], purge=True).purged
    assert _holders(store.layout.folder, b"slopes of Pichincha") == []
    assert store.verify().problems == ()


def test_a_file_that_a_full_disk_cut_off_does_not_outlive_a_purge(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    store.add(facts)
    cut_off = store.layout.folder / "tables" / "passages.lance" / "data" / ".tmpM3L8f"
    cut_off.write_bytes(b"slopes of Pichincha")
    store.remove([facts[5].passage_id], purge=True)
    assert _holders(store.layout.folder, b"slopes of Pichincha") == []


@pytest.mark.parametrize("step", PURGING)
def test_opening_a_store_finishes_a_purge_that_crashed(
    step: str, open_store: Open, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.add(facts)
    with monkeypatch.context() as patch:
        _crash_at(patch, *PURGING[step])
        with pytest.raises(Crash):
            store.remove([facts[5].passage_id], purge=True)
    store.close()
    store = open_store()
    assert _holders(store.layout.folder, b"slopes of Pichincha") == []
    assert store.verify().problems == ()


def test_a_store_whose_purge_is_unfinished_opens_beside_a_writer(
    open_store: Open, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.add(facts)
    with monkeypatch.context() as patch:
        _crash_at(patch, *PURGING["after the purge is recorded"])
        with pytest.raises(Crash):
            store.remove([facts[5].passage_id], purge=True)
    with store.catalog.writer():
        assert len(open_store().passages()) == 5


@pytest.mark.parametrize("is_written_to", [False, True])
def test_a_passage_that_one_source_gave_up_names_the_other_after_a_crash(
    is_written_to: bool, open_store: Open, facts: list[Passage], write_facts: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    one, two = write_facts("one.jsonl", facts[:3]), write_facts("two.jsonl", facts[2:4])
    store.ingest([one])
    store.ingest([two])
    write_facts("one.jsonl", facts[:2])
    with monkeypatch.context() as patch:
        _crash_at(patch, Catalog, "commit", True)
        with pytest.raises(Crash):
            store.ingest([one])
    if is_written_to:
        store.ingest([one])
    else:
        store.close()
        store = open_store()
    sources = {stored.passage_id: stored.passage.source for stored in store.passages()}
    assert sources[facts[2].passage_id] == two


def test_a_store_whose_making_was_cut_short_can_be_opened(
    open_store: Open, facts: list[Passage], tmp_path: Path
) -> None:
    (tmp_path / "kb").mkdir()
    (tmp_path / "kb" / f"store.json.{'0' * 32}").write_text('{"format"')
    assert open_store().add(facts[:1]).n_added == 1


def test_an_error_while_writing_leaves_the_store_as_it_was(
    open_store: Open, facts: list[Passage], visible: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.add(facts[:2])
    before = visible(store)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PassageTable, "retire", fail)
        with pytest.raises(OSError, match="No space"):
            store.replace(facts[0].passage_id, facts[2])
    assert (visible(store), store.verify().problems, store.catalog.staged()) == (before, (), None)
    assert store.stats().experts == 2


def test_a_process_that_ends_before_the_commit_leaves_nothing_visible(
    open_store: Open,
    prepared: str,
    expected: list[object],
    visible: Look,
    start_python: Callable[..., subprocess.Popen[str]],
) -> None:
    ended = start_python(
        "from knowstore.catalog import Catalog\n"
        "Catalog.commit = lambda *_, **__: os._exit(7)\n"
        "store.ingest([sys.argv[1]])\n",
        prepared,
    )
    _, said = ended.communicate(timeout=120)
    assert ended.returncode == 7, said
    store = open_store()
    assert (visible(store), store.verify().problems) == (expected[0], ())
    assert store.ingest([prepared]).passages_added == 2
    assert (visible(store), store.verify().problems) == (expected[1], ())


def _holders(folder: Path, needle: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes()]
