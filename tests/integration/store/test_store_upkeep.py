"""Verify finds what was damaged behind the store's back, and repair mends it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import lancedb
import pyarrow as pa
import pytest
from lancedb.table import Table

from knowstore.errors import CatalogError, ExpertChecksumError
from knowstore.records import Passage
from knowstore.store import KnowledgeStore

Open = Callable[..., KnowledgeStore]
Look = Callable[[KnowledgeStore], object]
Damage = Callable[[Table, Table, Passage, Passage], None]


def _again(table: Table, passage_id: str, **changes: object) -> None:
    """Write a stored row a second time, behind the back of everything that checks."""
    rows = table.search().where(f"id = '{passage_id}'").to_arrow().to_pylist()
    table.add(pa.Table.from_pylist([row | changes for row in rows], schema=table.schema))


def _expert_is_lost(_passages: Table, experts: Table, live: Passage, _removed: Passage) -> None:
    experts.delete(f"id = '{live.passage_id}'")


def _expert_of_a_removed_passage_is_damaged(_passages: Table, experts: Table, _live: Passage, removed: Passage) -> None:
    experts.update(where=f"id = '{removed.passage_id}'", values={"checksum": "0" * 32})


def _checksum_is_other(_passages: Table, experts: Table, live: Passage, _removed: Passage) -> None:
    experts.update(where=f"id = '{live.passage_id}'", values={"checksum": "0" * 32})


def _fingerprint_is_other(_passages: Table, experts: Table, live: Passage, _removed: Passage) -> None:
    experts.update(where=f"id = '{live.passage_id}'", values={"fingerprint": "another"})


def _expert_is_there_twice(_passages: Table, experts: Table, live: Passage, _removed: Passage) -> None:
    _again(experts, live.passage_id)


def _expert_has_no_passage(_passages: Table, experts: Table, live: Passage, _removed: Passage) -> None:
    _again(experts, live.passage_id, id="0" * 32)


def _live_passage_is_hidden(passages: Table, _experts: Table, live: Passage, _removed: Passage) -> None:
    passages.update(where=f"id = '{live.passage_id}'", values={"live_to": 1})


def _live_passage_is_staged(passages: Table, _experts: Table, live: Passage, _removed: Passage) -> None:
    passages.update(where=f"id = '{live.passage_id}'", values={"live_from": 77})


def _live_passage_has_an_end(passages: Table, _experts: Table, live: Passage, _removed: Passage) -> None:
    passages.update(where=f"id = '{live.passage_id}'", values={"live_to": 4})


def _live_passage_has_another_batch(passages: Table, _experts: Table, live: Passage, _removed: Passage) -> None:
    passages.update(where=f"id = '{live.passage_id}'", values={"live_from": 2})


def _removed_passage_is_visible(passages: Table, _experts: Table, _live: Passage, removed: Passage) -> None:
    passages.update(where=f"id = '{removed.passage_id}'", values={"live_to": 2**62})


def _removed_passage_has_another_interval(passages: Table, _experts: Table, _live: Passage, removed: Passage) -> None:
    passages.update(where=f"id = '{removed.passage_id}'", values={"live_from": 2, "live_to": 2})


def _expert_of_a_removed_passage_is_lost(_passages: Table, experts: Table, _live: Passage, removed: Passage) -> None:
    experts.delete(f"id = '{removed.passage_id}'")


def _passage_is_there_twice(passages: Table, _experts: Table, live: Passage, _removed: Passage) -> None:
    _again(passages, live.passage_id)


def _removed_passage_is_there_twice(passages: Table, _experts: Table, _live: Passage, removed: Passage) -> None:
    _again(passages, removed.passage_id)


def _passage_is_in_no_batch(passages: Table, _experts: Table, live: Passage, _removed: Passage) -> None:
    _again(passages, live.passage_id, id="0" * 32, text="Nobody put this here.")


def _passage_of_no_batch_is_staged(passages: Table, _experts: Table, live: Passage, _removed: Passage) -> None:
    _again(passages, live.passage_id, id="0" * 32, live_from=77)


DAMAGES: dict[str, tuple[Damage, set[str]]] = {
    "expert lost": (_expert_is_lost, {"missing expert"}),
    "checksum": (_checksum_is_other, {"damaged expert"}),
    "removed one's expert lost": (_expert_of_a_removed_passage_is_lost, {"missing expert"}),
    "fingerprint": (_fingerprint_is_other, {"damaged expert"}),
    "removed one's expert": (_expert_of_a_removed_passage_is_damaged, {"damaged expert"}),
    "expert twice": (_expert_is_there_twice, {"damaged expert"}),
    "orphan expert": (_expert_has_no_passage, {"orphan expert", "damaged expert"}),
    "hidden": (_live_passage_is_hidden, {"wrong visibility"}),
    "staged": (_live_passage_is_staged, {"wrong visibility"}),
    "ends later": (_live_passage_has_an_end, {"wrong visibility"}),
    "other batch": (_live_passage_has_another_batch, {"wrong visibility"}),
    "visible": (_removed_passage_is_visible, {"wrong visibility"}),
    "removed one's interval": (_removed_passage_has_another_interval, {"wrong visibility"}),
    "passage twice": (_passage_is_there_twice, {"duplicate passage"}),
    "removed passage twice": (_removed_passage_is_there_twice, {"duplicate passage"}),
    "orphan passage": (_passage_is_in_no_batch, {"orphan passage", "damaged passage"}),
    "staged orphan": (_passage_of_no_batch_is_staged, {"orphan passage", "damaged passage"}),
}


@pytest.fixture
def store(open_store: Open, facts: list[Passage]) -> KnowledgeStore:
    """Facts 0 to 2 live; 3 was removed in the last of three batches."""
    opened = open_store()
    opened.add(facts[:2])
    opened.add(facts[2:4])
    opened.remove([facts[3].passage_id])
    return opened


@pytest.mark.parametrize("damage", DAMAGES)
def test_planted_damage_is_found_and_mended(
    damage: str, store: KnowledgeStore, facts: list[Passage], visible: Look, open_store: Open
) -> None:
    before = visible(store)
    assert store.verify().problems == ()
    plant, kinds = DAMAGES[damage]
    connection = lancedb.connect(store.layout.tables)
    plant(connection.open_table("passages"), connection.open_table("experts"), facts[0], facts[3])
    report = store.verify()
    assert (report.clean, {problem.kind for problem in report.problems}) == (False, kinds)
    assert all("verify --repair" in problem.fix for problem in report.problems)
    assert store.verify(repair=True).problems == ()
    assert open_store().verify().problems == ()
    assert visible(store) == before
    assert store.rollback(3).restored == 1
    assert store.verify().problems == ()
    assert {one.passage_id for one in store.passages()} == {one.passage_id for one in facts[:4]}


def test_a_passage_whose_text_is_lost_is_reported_and_mended_by_ingesting_it_again(
    store: KnowledgeStore, facts: list[Passage]
) -> None:
    table = lancedb.connect(store.layout.tables).open_table("passages")
    table.delete(f"id = '{facts[0].passage_id}'")
    assert {problem.kind for problem in store.verify().problems} >= {"missing passage"}
    report = store.verify(repair=True)
    assert {problem.kind for problem in report.problems} == {"missing passage"}
    assert "ingest" in report.problems[0].fix
    store.remove([facts[0].passage_id])
    store.add([facts[0]])
    assert store.verify().problems == ()
    assert len(store.retrieve("Rome?")) == 3


@pytest.mark.parametrize("tables", [["passages"], ["passages", "experts"]])
@pytest.mark.parametrize("way_out", ["give it up", "ingest it again"])
def test_a_removed_passage_whose_text_is_lost_is_reported_until_it_is_given_up_or_ingested_again(
    tables: list[str], way_out: str, store: KnowledgeStore, facts: list[Passage]
) -> None:
    connection = lancedb.connect(store.layout.tables)
    for name in tables:
        connection.open_table(name).delete(f"id = '{facts[3].passage_id}'")
    for report in (store.verify(), store.verify(repair=True)):
        [problem] = report.problems
        assert (report.clean, problem.kind) == (False, "missing passage")
        assert f"passage {facts[3].passage_id}, removed by batch 3, is lost" in problem.detail
        assert f"remove {facts[3].passage_id} --purge" in problem.fix
    assert store.stats().experts == 5 - len(tables)  # that of a lost passage waits for it
    if way_out == "give it up":
        store.remove([facts[3].passage_id], purge=True)
    else:
        store.add([facts[3]])
    assert (store.verify().problems, store.stats().experts) == ((), 3 if way_out == "give it up" else 4)
    with pytest.raises(CatalogError, match="purged") if way_out == "give it up" else nullcontext():
        store.rollback(3)


def test_what_came_back_in_a_batch_that_was_never_committed_is_sound(
    store: KnowledgeStore, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise CatalogError("no", kept="nothing", fix="none")

    with monkeypatch.context() as patch:
        patch.setattr(store.catalog, "commit", fail)
        with pytest.raises(CatalogError):
            store.rollback(3)
    assert store.verify().problems == ()
    assert store.rollback(3).restored == 1


def test_a_rollback_to_a_passage_whose_text_is_lost_is_refused(
    store: KnowledgeStore, facts: list[Passage], visible: Look
) -> None:
    before = visible(store)
    table = lancedb.connect(store.layout.tables).open_table("passages")
    table.delete(f"id = '{facts[3].passage_id}'")
    with pytest.raises(Exception, match="verify") as refused:
        store.rollback(3)
    assert "lost" in str(refused.value)
    assert visible(store) == before


def test_a_damaged_expert_is_never_mounted(store: KnowledgeStore, facts: list[Passage]) -> None:
    experts = lancedb.connect(store.layout.tables).open_table("experts")
    experts.update(where=f"id = '{facts[0].passage_id}'", values={"checksum": "0" * 32})
    with pytest.raises(ExpertChecksumError):
        store.ask("When was Rome founded?")


def test_stats_count_what_is_there(store: KnowledgeStore) -> None:
    stats = store.stats()
    assert (stats.passages, stats.experts, stats.batches) == (3, 4, 3)
    assert stats.bytes["total"] == stats.bytes["passages"] + stats.bytes["experts"] + stats.bytes["catalog"]
    assert min(stats.bytes.values()) > 0


def test_passages_are_listed_by_pages_and_sources(store: KnowledgeStore, facts: list[Passage]) -> None:
    assert [one.passage for one in store.passages(limit=2)] == facts[:2]
    assert [one.passage for one in store.passages(limit=2, offset=2)] == facts[2:3]
    assert store.passages(offset=99) == []
    assert [one.passage for one in store.passages(source="italy")] == facts[:2]
    assert store.passages(source="nowhere") == []
