"""Ingest as one edit batch: what changes, what does not, and going on after an interrupt."""

from __future__ import annotations

import io
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from knowstore import _encoding
from knowstore.errors import SourceError
from knowstore.records import Passage
from knowstore.store import KnowledgeStore

Open = Callable[..., KnowledgeStore]
Write = Callable[[str, Sequence[Passage]], str]
Look = Callable[[KnowledgeStore], object]


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ingesting_again_changes_nothing_and_says_so(
    open_store: Open, write_facts: Write, facts: list[Passage], visible: Look, n_generated: Callable[[], int]
) -> None:
    store, path = open_store(), write_facts("facts.jsonl", facts)
    first = store.ingest([path], note="towns")
    assert (first.batch_id, first.passages_added, first.passages_unchanged, first.failures) == (1, 6, 0, ())
    assert (n_generated(), store.batches()[0].note) == (6, "towns")
    before = visible(store)
    again = store.ingest([path])
    assert (again.batch_id, again.passages_added, again.passages_unchanged, again.passages_superseded) == (
        None,
        0,
        6,
        0,
    )
    assert (n_generated(), len(store.batches()), visible(store)) == (0, 1, before)
    assert store.verify().clean


def test_a_changed_file_supersedes_its_old_passages(
    open_store: Open, write_facts: Write, facts: list[Passage], n_generated: Callable[[], int]
) -> None:
    store = open_store()
    store.ingest([write_facts("facts.jsonl", facts[:3])])
    n_generated()
    report = store.ingest([write_facts("facts.jsonl", facts[1:4])])
    assert (report.passages_added, report.passages_unchanged, report.passages_superseded) == (1, 2, 1)
    assert n_generated() == 1
    assert {one.passage.text for one in store.passages()} == {one.text for one in facts[1:4]}
    assert facts[0].passage_id not in {hit.passage_id for hit in store.retrieve("When was Rome founded?")}
    assert [pair[0] for pair in store.batch_items(2)["superseded"]] == [facts[0].passage_id]
    assert store.show(facts[0].passage_id).stored.state == "removed"
    assert store.verify().clean


def test_a_passage_that_comes_back_is_not_generated_again(
    open_store: Open, write_facts: Write, facts: list[Passage], n_generated: Callable[[], int]
) -> None:
    store = open_store()
    store.ingest([write_facts("facts.jsonl", facts[:2])])
    store.ingest([write_facts("facts.jsonl", facts[1:2])])
    n_generated()
    assert store.ingest([write_facts("facts.jsonl", facts[:2])]).passages_added == 1
    assert (n_generated(), store.verify().clean) == (0, True)
    assert {one.passage_id: one.batch_id for one in store.passages()}[facts[0].passage_id] == 3


def test_a_passage_in_two_sources_lives_until_the_last_of_them_goes(
    open_store: Open, write_facts: Write, facts: list[Passage]
) -> None:
    store = open_store()
    first = store.ingest([write_facts("one.jsonl", facts[:2]), write_facts("two.jsonl", facts[1:3])])
    assert first.passages_added == 3
    shared = facts[1].passage_id
    report = store.ingest([write_facts("one.jsonl", facts[:1])])
    assert report.passages_superseded == 0
    sources = {hit.passage_id: hit.source for hit in store.retrieve("Who was the first king of Rome?")}
    assert sources[shared].endswith("two.jsonl")
    report = store.ingest([write_facts("two.jsonl", facts[2:3])])
    assert report.passages_superseded == 1
    assert shared not in {hit.passage_id for hit in store.retrieve("Who was the first king of Rome?")}
    assert store.verify().clean


def test_a_source_that_cannot_be_read_supersedes_nothing(
    open_store: Open, write_facts: Write, facts: list[Passage], tmp_path: Path
) -> None:
    store = open_store()
    good, bad = write_facts("good.jsonl", facts[:2]), write_facts("bad.jsonl", facts[2:4])
    store.ingest([good, bad])
    Path(bad).write_bytes(b"\x00\x01\x02" * 1000)
    write_facts("good.jsonl", [facts[0], facts[4]])
    report = store.ingest([good, bad, str(tmp_path / "absent.txt")])
    assert len(report.failures) == 2
    assert (report.passages_added, report.passages_superseded) == (1, 1)
    assert {one.passage_id for one in store.passages(source=bad)} == {one.passage_id for one in facts[2:4]}
    assert store.verify().clean


def test_a_source_of_which_a_row_cannot_be_read_supersedes_nothing(
    open_store: Open, write_facts: Write, facts: list[Passage]
) -> None:
    store = open_store()
    path = write_facts("facts.jsonl", facts[:2])
    store.ingest([path])
    write_facts("facts.jsonl", [facts[0], facts[2]])
    with Path(path).open("a", encoding="utf-8") as file:
        file.write('{"text": "Lyon lies')
    report = store.ingest([path])
    assert (len(report.failures), report.passages_added, report.passages_superseded) == (1, 1, 0)
    assert len(store.passages()) == 3
    write_facts("facts.jsonl", [facts[0], facts[2]])
    assert store.ingest([path]).passages_superseded == 1


def test_strict_ingest_stops_at_the_first_failure_and_writes_nothing(
    open_store: Open, write_facts: Write, facts: list[Passage], tmp_path: Path
) -> None:
    store = open_store()
    (tmp_path / "bad.jsonl").write_bytes(b"\x00\x01\x02" * 1000)
    good = write_facts("good.jsonl", facts[:2])
    before = _files(store.layout.folder)
    with pytest.raises(SourceError):
        store.ingest([good, str(tmp_path / "bad.jsonl")], strict=True)
    assert (store.batches(), store.passages(), _files(store.layout.folder)) == ([], [], before)
    assert store.ingest([good], strict=True).passages_added == 2


def test_a_plan_says_what_an_ingest_would_do_writes_nothing_and_loads_no_model(
    open_store: Open, write_facts: Write, facts: list[Passage], tmp_path: Path
) -> None:
    store = open_store()
    path = write_facts("facts.jsonl", facts[:3])
    plan = store.plan([path])
    assert (plan.new, plan.unchanged, plan.superseded, plan.sources, plan.failures) == (3, 0, 0, 1, ())
    store.ingest([path])
    write_facts("facts.jsonl", facts[1:5])
    store.close()
    store = open_store()
    before = _files(store.layout.folder)
    plan = store.plan([path, str(tmp_path / "absent.txt")])
    assert (plan.new, plan.unchanged, plan.superseded, len(plan.failures)) == (2, 2, 1, 1)
    assert _files(store.layout.folder) == before
    assert not {"llm", "retriever", "hypernetwork", "reranker"} & vars(store.models).keys()
    report = store.ingest([path])
    assert (report.passages_added, report.passages_unchanged, report.passages_superseded) == (2, 2, 1)


def test_standard_input_is_a_source_like_any_other(open_store: Open) -> None:
    store = open_store()
    rome = b"Rome was founded in 753 BC."
    assert store.ingest(["-"], stdin=io.BytesIO(rome)).passages_added == 1
    assert store.ingest(["-"], stdin=io.BytesIO(rome)).batch_id is None
    assert store.ingest(["-"], stdin=io.BytesIO(b"Lyon lies on the Saone.")).passages_superseded == 1
    assert [one.passage.text for one in store.passages(source="-")] == ["Lyon lies on the Saone."]


def test_an_interrupted_ingest_goes_on_where_it_was(
    open_store: Open,
    write_facts: Write,
    facts: list[Passage],
    visible: Look,
    n_generated: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_encoding, "CHUNK", 2)
    path = write_facts("facts.jsonl", facts)

    def interrupt(stage: str, done: int, _total: int | None) -> None:
        if stage.startswith("embedding") and done > 2:
            raise KeyboardInterrupt

    store = open_store(on_progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.ingest([path])
    assert (store.passages(), store.retrieve("Rome?")) == ([], [])
    store.close()
    n_generated()
    store = open_store()
    assert store.verify().clean
    report = store.ingest([path])
    assert (report.passages_added, n_generated()) == (6, 4)
    assert store.verify().clean
    untouched = open_store("untouched")
    untouched.ingest([path])
    assert visible(store) == visible(untouched)


def test_a_killed_ingest_goes_on_where_it_was(
    open_store: Open,
    write_facts: Write,
    facts: list[Passage],
    visible: Look,
    n_generated: Callable[[], int],
    start_python: Callable[..., subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_encoding, "CHUNK", 2)  # what shares a forward pass decides the last bits on some CPUs
    path = write_facts("facts.jsonl", facts)
    killed = start_python(
        "from knowstore import _encoding\n"
        "_encoding.CHUNK = 2\n"
        "store._on_progress = lambda stage, n, _: stage[0] == 'e' and n > 4 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.ingest([sys.argv[1]])\n",
        path,
    )
    _, said = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, said
    store = open_store()
    assert (store.passages(), store.verify().clean) == ([], True)
    report = store.ingest([path])
    assert (report.passages_added, n_generated()) == (6, 2)
    assert store.verify().clean
    untouched = open_store("untouched")
    untouched.ingest([path])
    assert visible(store) == visible(untouched)


def test_an_interrupted_ingest_is_finished_by_one_of_other_files(
    open_store: Open,
    write_facts: Write,
    facts: list[Passage],
    n_generated: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_encoding, "CHUNK", 2)

    def interrupt(stage: str, done: int, _total: int | None) -> None:
        if stage.startswith("embedding") and done > 2:
            raise KeyboardInterrupt

    store = open_store(on_progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.ingest([write_facts("one.jsonl", facts[:4])], note="first try")
    store.close()
    n_generated()
    store = open_store()
    report = store.ingest([write_facts("two.jsonl", [*facts[:1], *facts[4:]])], note="other files")
    assert (report.passages_added, n_generated()) == (3, 2)
    assert [batch.note for batch in store.batches()] == ["other files"]
    assert {one.passage_id for one in store.passages()} == {one.passage_id for one in [*facts[:1], *facts[4:]]}
    assert (store.verify().clean, store.stats().experts) == (True, 3)


def test_a_store_in_a_folder_that_is_ingested_is_none_of_its_sources(
    open_store: Open, write_facts: Write, facts: list[Passage], tmp_path: Path
) -> None:
    path = write_facts("facts.jsonl", facts[:2])
    store = open_store("kb")
    for paths, n_added in (([str(tmp_path)], 2), ([str(tmp_path), f"{tmp_path}/*", f"{tmp_path}/**/*.json"], 0)):
        report = store.ingest(paths, strict=n_added > 0)
        assert report.passages_added == n_added
        assert not any("kb" in failure.source for failure in report.failures)
    assert store.plan([str(tmp_path)]).failures == ()
    assert store.catalog.sources() == [(path, 2)]
