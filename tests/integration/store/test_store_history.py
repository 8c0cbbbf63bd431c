"""Rollback, replacement and removal: what was live comes back exactly, what was purged is nowhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from knowstore.config import BankConfig, Filters, RetrievalConfig
from knowstore.errors import CatalogError, PassageError, UnknownBatchError, UnknownPassageError
from knowstore.records import Passage
from knowstore.store import KnowledgeStore

WHEN = "When was Rome founded?"
Open = Callable[..., KnowledgeStore]
Write = Callable[[str, Sequence[Passage]], str]
Look = Callable[[KnowledgeStore], object]

SECRET = Passage("The vault opens with the word xylophone-quixotry.", "Zanzibarred vault", "secret-files")


def test_a_rollback_restores_exactly_what_was_there_before(
    open_store: Open, write_facts: Write, facts: list[Passage], visible: Look
) -> None:
    store = open_store()
    states = [visible(store)]
    store.ingest([write_facts("facts.jsonl", facts[:3])])
    states.append(visible(store))
    store.ingest([write_facts("facts.jsonl", facts[1:4])])
    states.append(visible(store))
    store.remove([facts[1].passage_id])
    states.append(visible(store))
    store.replace(facts[2].passage_id, facts[4])
    for batch_id in (4, 3, 2, 1):
        preview = store.rollback_preview(batch_id)
        report = store.rollback(batch_id)
        assert (preview.restored, preview.removed) == (report.restored, report.removed)
        assert visible(store) == states[batch_id - 1]
        assert store.verify().problems == ()


def test_a_rollback_over_several_batches_can_be_rolled_back(
    open_store: Open, facts: list[Passage], visible: Look
) -> None:
    store = open_store()
    store.add(facts[:2])
    before = visible(store)
    store.add(facts[2:4])
    store.remove([facts[0].passage_id])
    after = visible(store)
    report = store.rollback(2)
    assert (report.restored, report.removed) == (1, 2)
    assert visible(store) == before
    assert report.batch_id is not None
    store.rollback(report.batch_id)
    assert (visible(store), store.verify().problems) == (after, ())
    assert [batch.kind for batch in store.batches()] == ["rollback", "rollback", "remove", "add", "add"]


def test_a_preview_changes_nothing(open_store: Open, facts: list[Passage], visible: Look) -> None:
    store = open_store()
    store.add(facts[:2])
    before = visible(store)
    report = store.rollback_preview(1)
    assert (report.batch_id, report.removed) == (None, 2)
    assert (visible(store), len(store.batches())) == (before, 1)


def test_a_rollback_to_what_was_purged_is_refused(open_store: Open, facts: list[Passage], visible: Look) -> None:
    store = open_store()
    store.add(facts[:2])
    store.remove([facts[0].passage_id], purge=True)
    before = visible(store)
    with pytest.raises(CatalogError, match="purged"):
        store.rollback(2)
    with pytest.raises(CatalogError, match="purged"):
        store.rollback_preview(2)
    assert (visible(store), len(store.batches()), store.verify().problems) == (before, 2, ())
    store.rollback(1)
    assert store.passages() == []


def test_a_purged_passage_can_be_added_and_purged_again(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    store.add(facts[:2])
    for _ in range(2):
        store.remove([facts[0].passage_id], purge=True)
        with pytest.raises(CatalogError, match="purged"):
            store.rollback(store.batches()[0].id)
        store.add([facts[0]])
    assert (len(store.passages()), store.verify().problems) == (2, ())


@pytest.mark.parametrize("batch_id", [0, -1, 99, 2**40])
def test_a_rollback_of_no_batch_is_refused(batch_id: int, open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    store.add(facts[:1])
    with pytest.raises(UnknownBatchError):
        store.rollback(batch_id)
    assert len(store.passages()) == 1


def test_a_replacement_is_one_batch_and_leaves_only_the_new_passage(
    open_store: Open, facts: list[Passage], visible: Look
) -> None:
    store = open_store()
    store.add(facts[:2])
    before = visible(store)
    newer = Passage("Rome was founded in 754 BC.", "Rome", "italy")
    batch = store.replace(facts[0].passage_id, newer, note="mended")
    assert (batch.kind, batch.n_added, batch.n_removed, batch.note) == ("replace", 1, 1, "mended")
    assert {one.passage.text for one in store.passages()} == {newer.text, facts[1].text}
    assert {hit.text for hit in store.retrieve("When was Rome founded?")} == {newer.text, facts[1].text}
    with pytest.raises(UnknownPassageError):
        store.replace(facts[0].passage_id, facts[2])
    store.rollback(batch.id)
    assert (visible(store), store.verify().problems) == (before, ())


def test_what_cannot_be_added_is_refused_and_changes_nothing(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    store.add(facts[:1])
    half, undated = Passage("half of a character: \ud800"), Passage("Rome is old.", date="last week")
    for passages in ([Passage(" \n\t")], [facts[1], Passage("", "title")], [half], [facts[0]], [undated], []):
        with pytest.raises(PassageError):
            store.add(passages)
    with pytest.raises(PassageError, match="live already"):
        store.replace(facts[0].passage_id, facts[0])
    for refuse in (store.replace, store.check_replacement):
        with pytest.raises(PassageError, match="date cannot change alone"):
            refuse(facts[0].passage_id, replace(facts[0], date="2021"))
    assert (len(store.batches()), len(store.passages())) == (1, 1)


def test_dates_that_cannot_be_read_are_refused(open_store: Open) -> None:
    store = open_store()
    for date in ("01/02/2024", "2024-13", "2024-03-12 or so", "soon"):
        with pytest.raises(PassageError, match="date"):
            store.add([Passage("Rome is old.", date=date)])


def test_dates_are_kept_as_filters_compare_them(open_store: Open) -> None:
    store = open_store()
    dates = ["2024", "2024-03", "2024-3-12", "12 March 2024", "2024-03-12T10:00:00"]
    store.add([Passage(f"Rome is old, {date}.", date=date) for date in dates])
    assert [one.passage.date for one in store.passages()] == ["2024-01-01", "2024-03-01", *["2024-03-12"] * 3]
    for low, high, n in ((None, "2023", 0), ("2024-01-01", "2024", 5), ("2024-03-02", None, 3), ("2025", None, 0)):
        assert len(store.retrieve("Is Rome old?", filters=Filters(date_from=low, date_to=high))) == n


def test_a_passage_is_found_by_each_of_its_sources(open_store: Open, facts: list[Passage]) -> None:
    store = open_store(retrieval=RetrievalConfig(null_threshold=None))
    rome, *others = facts[:3]
    store.add([replace(rome, source=source) for source in ("a/x", "a/y", "b")] + others)
    assert {source for _, source in store.catalog.live_placements(passage_ids=[rome.passage_id])} == {"a/x", "a/y", "b"}
    for source in ("a/x", "a/y", "a/*", "b"):
        assert [hit.passage_id for hit in store.retrieve(WHEN, filters=Filters(source=source))] == [rome.passage_id]
    assert store.retrieve(WHEN, filters=Filters(source="A/x")) == []
    batch = store.remove([rome.passage_id])
    assert store.retrieve(WHEN, filters=Filters(source="b")) == []
    store.rollback(batch.batch_id or 0)
    assert store.ask(WHEN, filters=Filters(source="b")).experts


def test_removing_unknown_passages_removes_none(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    store.add(facts[:2])
    for is_purge in (False, True):
        with pytest.raises(UnknownPassageError, match="no-such-id"):
            store.remove([facts[0].passage_id, "no-such-id"], purge=is_purge)
    assert (len(store.passages()), len(store.batches())) == (2, 1)


def test_a_removed_passage_is_never_found_and_its_batch_is_recorded(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    store.add(facts[:3])
    report = store.remove([facts[0].passage_id, facts[0].passage_id])
    assert (report.batch_id, report.removed, report.purged) == (2, 1, False)
    for question in ("When was Rome founded?", facts[0].text):
        assert facts[0].passage_id not in {hit.passage_id for hit in store.retrieve(question)}
    with pytest.raises(UnknownPassageError), store.mount([facts[0].passage_id]):
        pass
    with pytest.raises(UnknownPassageError):
        store.remove([facts[0].passage_id])


def test_purged_text_and_tensors_are_in_no_file_and_answers_are_those_of_a_store_that_never_held_them(
    open_store: Open, facts: list[Passage], visible: Look
) -> None:
    exact = BankConfig(codec="float32")
    store, never = open_store(bank=exact), open_store("never", bank=exact)
    never.add(facts[:3])
    store.add(facts[:3])
    store.add([SECRET])
    folder = store.layout.folder
    tensors = next(iter(store._tables.bank().iter_encoded([SECRET.passage_id]))).data
    needles = [
        b"xylophone-quixotry", b"xylophone", b"Zanzibarred", b"zanzibar", b"secret-files",
        tensors, tensors[len(tensors) // 2 :][:64], tensors[-64:],
    ]  # fmt: skip
    assert [bool(_holders(folder, needle)) for needle in needles if needle != b"zanzibar"] == [True] * 7
    report = store.remove([SECRET.passage_id], purge=True)
    assert (report.removed, report.purged) == (1, True)
    assert [_holders(folder, needle) for needle in needles if needle != b"secret-files"] == [[]] * 7
    assert store.verify().problems == ()

    found = [one for state in (visible(store), visible(never)) for one in state[1:]]  # type: ignore[index]
    assert found[: len(found) // 2] == found[len(found) // 2 :]
    for question in ("What opens the vault?", "When was Rome founded?"):
        assert [(hit.passage_id, hit.retrieval_score, hit.score) for hit in store.retrieve(question)] == [
            (hit.passage_id, hit.retrieval_score, hit.score) for hit in never.retrieve(question)
        ]
        assert torch.equal(_logits(store, question), _logits(never, question))


def test_a_batch_records_the_versions_of_the_tables(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    store.add(facts[:2])
    store.add(facts[2:])
    first, second = (store.catalog.versions(batch_id) for batch_id in (1, 2))
    for table, latest in (("passages", store._tables.passages()), ("experts", store._tables.bank())):
        before, after = (second[f"{table}_{time}"] for time in ("before", "after"))
        assert before is not None
        assert after is not None
        assert first[f"{table}_after"] == before < after
        assert after == latest.version


def test_what_was_removed_before_can_be_purged_later_by_a_store_that_was_open_meanwhile(
    open_store: Open, facts: list[Passage]
) -> None:
    store = open_store()
    store.add(facts[:1])
    store.add([SECRET])
    store.remove([SECRET.passage_id])
    assert len(store.retrieve("vault")) == 1
    other = open_store()
    other.add(facts[1:3])
    report = store.remove([SECRET.passage_id], purge=True)
    assert (report.batch_id, report.removed, report.purged) == (None, 0, True)
    assert _holders(store.layout.folder, b"xylophone") == []
    assert (len(store.passages()), store.stats().experts, store.verify().problems) == (3, 3, ())
    with pytest.raises(UnknownPassageError):
        store.show(SECRET.passage_id)


def _holders(folder: Path, needle: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes()]


def _logits(store: KnowledgeStore, question: str) -> torch.Tensor:
    with store.mount(question) as llm, torch.inference_mode():
        logits: torch.Tensor = llm.model(torch.tensor([llm.prompt_ids(question)])).logits
    return logits
