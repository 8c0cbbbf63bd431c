from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from knowstore.catalog import Catalog, Change
from knowstore.errors import CatalogError, UnknownBatchError
from knowstore.records import BatchKind, EditBatch

A, B, C = (letter * 32 for letter in "abc")


def edit(catalog: Catalog, kind: BatchKind = "ingest", **pairs: list[tuple[str, str]]) -> EditBatch:
    return catalog.commit(catalog.stage(kind).id, Change(**pairs))


def test_an_empty_catalog_has_nothing_live(catalog: Catalog) -> None:
    assert catalog.head() == 0
    assert catalog.staged() is None
    assert catalog.live_ids() == set()
    assert catalog.count_live() == 0
    assert catalog.batches() == []
    assert catalog.sources() == []
    assert list(catalog.intervals()) == []
    assert catalog.placements_at(0) == set()
    assert catalog.live_ids([]) == set()


def test_a_staged_batch_is_invisible_until_it_is_committed(catalog: Catalog) -> None:
    batch = catalog.stage("ingest", "first", passages_version=3, experts_version=4)
    assert (batch.state, batch.note, batch.committed_at) == ("staged", "first", None)
    assert catalog.staged() == batch
    assert catalog.head() == 0

    done = catalog.commit(batch.id, Change(added=[(A, "x"), (B, "x")]), passages_version=5, experts_version=6)

    assert (done.state, done.n_added, done.n_removed, done.n_superseded) == ("live", 2, 0, 0)
    assert catalog.staged() is None
    assert catalog.head() == done.id
    assert catalog.live_ids() == {A, B}
    assert catalog.live_ids([A, C]) == {A}
    assert catalog.versions(done.id) == {
        "passages_before": 3, "passages_after": 5, "experts_before": 4, "experts_after": 6
    }  # fmt: skip


def test_times_of_a_batch_are_aware_and_utc(catalog: Catalog) -> None:
    batch = edit(catalog, added=[(A, "x")])
    assert batch.committed_at is not None
    for moment in (batch.created_at, batch.committed_at):
        assert moment.tzinfo is UTC
        assert abs(datetime.now(UTC) - moment) < timedelta(minutes=1)


def test_only_one_batch_is_staged_at_a_time(catalog: Catalog) -> None:
    first = catalog.stage("ingest")
    with pytest.raises(CatalogError, match=f"edit batch {first.id} is staged already"):
        catalog.stage("ingest")
    assert catalog.staged() == first


def test_a_discarded_batch_changes_nothing_and_its_id_is_not_used_again(catalog: Catalog) -> None:
    first = catalog.stage("ingest")
    catalog.discard(first.id)
    assert catalog.batch(first.id).state == "discarded"
    assert catalog.head() == 0
    assert catalog.stage("ingest").id > first.id


def test_a_batch_that_is_not_staged_is_neither_committed_nor_discarded(catalog: Catalog) -> None:
    batch = edit(catalog, added=[(A, "x")])
    with pytest.raises(CatalogError, match="is live, not staged"):
        catalog.commit(batch.id, Change(added=[(B, "x")]))
    with pytest.raises(CatalogError, match="is live, not staged"):
        catalog.discard(batch.id)
    assert catalog.live_ids() == {A}


@pytest.mark.parametrize("batch_id", [0, -1, 7, 2**31, 10**30])
def test_an_unknown_batch_is_named(catalog: Catalog, batch_id: int) -> None:
    for ask in (catalog.batch, catalog.batch_items, catalog.rollback_change, catalog.discard, catalog.versions):
        with pytest.raises(UnknownBatchError, match=str(batch_id)):
            ask(batch_id)


def test_a_batch_that_never_was_live_is_not_rolled_back(catalog: Catalog) -> None:
    batch = catalog.stage("ingest")
    with pytest.raises(UnknownBatchError, match="is staged"):
        catalog.rollback_change(batch.id)
    catalog.discard(batch.id)
    with pytest.raises(UnknownBatchError, match="is discarded"):
        catalog.placements_at(batch.id)


def test_adding_what_is_live_and_removing_what_is_not_are_ignored(catalog: Catalog) -> None:
    edit(catalog, added=[(A, "x"), (A, "x")])
    again = edit(catalog, added=[(A, "x")], removed=[(B, "x"), (A, "y")])
    assert (again.n_added, again.n_removed) == (0, 0)
    assert catalog.batch_items(again.id) == {"added": [], "removed": [], "superseded": []}
    assert catalog.live_placements() == [(A, "x")]


def test_a_passage_of_two_sources_lives_until_the_last_goes(catalog: Catalog) -> None:
    first = edit(catalog, added=[(A, "x")])
    second = edit(catalog, added=[(A, "y")])
    assert second.n_added == 0
    third = edit(catalog, "remove", removed=[(A, "x")])
    assert third.n_removed == 0
    assert catalog.live_ids() == {A}
    assert catalog.first_batch([A, B]) == {A: first.id}
    assert edit(catalog, "remove", removed=[(A, "y")]).n_removed == 1
    assert catalog.live_ids() == set()
    assert catalog.first_batch([A]) == {}


def test_effects_are_what_the_commit_then_counts(catalog: Catalog) -> None:
    edit(catalog, added=[(A, "x"), (B, "x"), (B, "y")])
    change = Change(added=[(C, "x"), (A, "z")], removed=[(B, "y")], superseded=[(A, "x"), (B, "x")])
    assert catalog.effects(change) == ({C}, {B})
    batch = catalog.commit(catalog.stage("ingest").id, change)
    assert (batch.n_added, batch.n_removed, batch.n_superseded) == (1, 1, 1)
    assert catalog.live_ids() == {A, C}
    assert catalog.batch_items(batch.id) == {
        "added": [(C, "x"), (A, "z")], "removed": [(B, "y")], "superseded": [(A, "x"), (B, "x")]
    }  # fmt: skip


def test_a_pair_both_added_and_removed_stays(catalog: Catalog) -> None:
    edit(catalog, added=[(A, "x")])
    change = Change(added=[(A, "x"), (B, "x")], removed=[(A, "x"), (B, "x")])
    assert catalog.effects(change) == ({B}, set())
    catalog.commit(catalog.stage("replace").id, change)
    assert catalog.live_ids() == {A, B}


def test_sources_and_placements_can_be_listed(catalog: Catalog) -> None:
    edit(catalog, added=[(A, "x"), (B, "ÿ/ü 'quoted'.txt"), (C, "x")])
    edit(catalog, added=[(A, "")])
    assert sorted(catalog.sources()) == [("", 1), ("x", 2), ("ÿ/ü 'quoted'.txt", 1)]
    assert catalog.live_placements(source="x") == [(A, "x"), (C, "x")]
    assert catalog.live_placements(source="") == [(A, "")]
    assert catalog.live_placements(passage_ids=[A]) == [(A, "x"), (A, "")]
    assert catalog.live_placements(source="x", passage_ids=[B]) == []
    assert catalog.count_live() == 3


def test_batches_come_newest_first_in_pages(catalog: Catalog) -> None:
    ids = [edit(catalog, added=[(A, str(n))]).id for n in range(4)]
    assert [batch.id for batch in catalog.batches()] == ids[::-1]
    assert [batch.id for batch in catalog.batches(limit=2, offset=1)] == [ids[2], ids[1]]


def test_a_rollback_can_be_rolled_back(catalog: Catalog) -> None:
    edit(catalog, added=[(A, "x"), (B, "x")])
    second = edit(catalog, added=[(C, "x")], superseded=[(A, "x")])
    edit(catalog, "remove", removed=[(B, "x")])

    change = catalog.rollback_change(second.id)
    assert change == Change(added=[(A, "x"), (B, "x")], removed=[(C, "x")])
    rollback = catalog.commit(catalog.stage("rollback").id, change)
    assert (rollback.n_added, rollback.n_removed, rollback.n_superseded) == (2, 1, 0)
    assert catalog.live_ids() == {A, B}
    assert catalog.batch_items(rollback.id)["removed"] == [(C, "x")]

    catalog.commit(catalog.stage("rollback").id, catalog.rollback_change(rollback.id))
    assert catalog.live_ids() == {C}
    assert catalog.rollback_change(catalog.head()) == change


def test_purged_passages_are_known_until_they_are_added_again(catalog: Catalog) -> None:
    edit(catalog, added=[(A, "x"), (B, "x")])
    removal = edit(catalog, "remove", removed=[(A, "x")])
    catalog.record_purge(removal.id, [A, A])
    catalog.record_purge(removal.id, [A])
    catalog.record_purge(removal.id, [])
    assert catalog.purged([A, B]) == {A}
    assert catalog.purged([passage_id for passage_id, _ in catalog.rollback_change(removal.id).added]) == {A}
    edit(catalog, added=[(A, "x")])
    assert catalog.purged([A, B]) == set()
    with pytest.raises(UnknownBatchError):
        catalog.record_purge(99, [A])


def test_settings_keep_json_values(catalog: Catalog) -> None:
    assert catalog.setting("k") is None
    assert catalog.setting("k", 3) == 3
    for value in ({"a": [1, None, "ü"]}, None, 0.5, False, "text"):
        catalog.set_setting("k", value)
        assert catalog.setting("k", "default") == value


def test_a_fingerprint_is_recorded_once(catalog: Catalog) -> None:
    catalog.fingerprint("llm", "d1", {"layers": 30})
    catalog.fingerprint("llm", "d1", {"layers": 31})
    catalog.fingerprint("hypernetwork", "d2", {})
    found = catalog.fingerprints()
    assert [(f["kind"], f["digest"], f["detail"]) for f in found] == [
        ("llm", "d1", {"layers": 30}), ("hypernetwork", "d2", {})
    ]  # fmt: skip


def test_a_commit_that_fails_leaves_the_batch_staged_and_nothing_live(catalog: Catalog) -> None:
    batch = catalog.stage("ingest")
    with pytest.raises(CatalogError) as caught:
        catalog.commit(batch.id, Change(added=[(A, "x"), (B, "caf\udce9.txt")]))
    assert "Unicode" in caught.value.what
    assert catalog.staged() == batch
    assert catalog.live_ids() == set()


class Model:
    """The catalog in the plainest form: the set of live pairs after each live batch."""

    def __init__(self) -> None:
        self.states: dict[int, set[tuple[str, str]]] = {0: set()}

    def head(self) -> int:
        return max(self.states)

    def intervals(self) -> Iterator[tuple[str, int, int | None]]:
        seen: dict[str, tuple[int, int | None]] = {}
        before: set[str] = set()
        for batch_id in sorted(self.states):
            after = {passage_id for passage_id, _ in self.states[batch_id]}
            seen |= dict.fromkeys(after - before, (batch_id, None))
            seen |= {passage_id: (seen[passage_id][0], batch_id) for passage_id in before - after}
            before = after
        for passage_id, (live_from, live_to) in sorted(seen.items()):
            yield passage_id, live_from, live_to


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_edits_agree_with_a_model(catalog: Catalog, seed: int) -> None:
    rng = random.Random(seed)
    model = Model()
    pairs = [(f"{n:032x}", source) for n in range(6) for source in "xy"]
    for _ in range(30):
        kind: BatchKind = rng.choice(["ingest", "remove", "replace", "rollback"])
        batch = catalog.stage(kind)
        if rng.random() < 0.1:
            catalog.discard(batch.id)
            continue
        target: set[tuple[str, str]] | None = None
        if kind == "rollback" and model.head():
            victim = rng.choice([batch_id for batch_id in model.states if batch_id])
            target = model.states[max(batch_id for batch_id in model.states if batch_id < victim)]
            change = catalog.rollback_change(victim)
        else:
            added, removed, superseded = (rng.sample(pairs, rng.randrange(4)) for _ in range(3))
            change = Change(added, removed, superseded)

        before = model.states[model.head()]
        after = (before - set(change.removed) - set(change.superseded)) | set(change.added)
        assert target is None or after == target
        ids_before, ids_after = ({passage_id for passage_id, _ in state} for state in (before, after))
        assert catalog.effects(change) == (ids_after - ids_before, ids_before - ids_after)
        done = catalog.commit(batch.id, change)
        model.states[done.id] = after

        assert (done.n_added, done.n_removed) == (len(ids_after - ids_before), len(ids_before - ids_after))
        assert done.n_superseded <= done.n_removed
        assert catalog.live_ids() == ids_after
        assert catalog.count_live() == len(ids_after)
        assert set(catalog.live_placements()) == after
        assert list(catalog.intervals()) == list(model.intervals())
    for batch_id, state in model.states.items():
        assert catalog.placements_at(batch_id) == state


def test_forty_thousand_placements_are_committed_and_taken_back(catalog: Catalog) -> None:
    pairs = [(f"{n:032x}", f"source {n % 7}") for n in range(40_000)]
    first = edit(catalog, added=pairs)
    assert first.n_added == 40_000
    assert catalog.live_ids([passage_id for passage_id, _ in pairs]) == {passage_id for passage_id, _ in pairs}
    edit(catalog, "rollback", **vars(catalog.rollback_change(first.id)))
    assert catalog.count_live() == 0
