"""A store against a dictionary: what is added, removed, replaced, rolled back, purged and reopened, in any order."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from knowstore._loaded import LoadedModels
from knowstore.errors import CatalogError, PassageError, UnknownPassageError
from knowstore.records import Passage
from tests.faults.checks import disagreements, leftovers
from tests.faults.models import make_models
from tests.faults.scenes import open_store

_TOWNS = [
    Passage(f"Town {number} lies {number} miles inland. It has a mill.", f"Town {number}", f"source {number % 2}")
    for number in range(6)
]
_some_towns = st.lists(st.sampled_from(_TOWNS), min_size=1, max_size=3, unique=True)
_town = st.sampled_from(_TOWNS)


class Histories(RuleBasedStateMachine):
    """`live` is what the store should hold; `states` what it held after each edit batch, by its id."""

    models: LoadedModels

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="knowstore-history-"))
        self.store = open_store(self.folder / "kb", self.models)
        self.live: dict[str, Passage] = {}
        self.states: dict[int, dict[str, Passage]] = {}
        self.purged: set[str] = set()

    @initialize(towns=_some_towns)
    def begin(self, towns: list[Passage]) -> None:
        self.add(towns)

    @rule(towns=_some_towns)
    def add(self, towns: list[Passage]) -> None:
        new = {town.passage_id: town for town in towns if town.passage_id not in self.live}
        if not new:
            with pytest.raises(PassageError, match="live already"):
                self.store.add(towns)
            return
        batch = self.store.add(towns)
        assert batch.n_added == len(new)
        self._became(batch.id, self.live | new)

    @rule(towns=_some_towns)
    def remove(self, towns: list[Passage]) -> None:
        ids = [town.passage_id for town in towns]
        if not self.live.keys() >= set(ids):
            with pytest.raises(UnknownPassageError):
                self.store.remove(ids)
            return
        report = self.store.remove(ids)
        assert report.removed == len(ids)
        self._became(report.batch_id, {key: town for key, town in self.live.items() if key not in ids})

    @rule(old=_town, new=_town)
    def replace(self, old: Passage, new: Passage) -> None:
        if old.passage_id not in self.live:
            with pytest.raises(UnknownPassageError):
                self.store.replace(old.passage_id, new)
        elif new.passage_id == old.passage_id:
            with pytest.raises(PassageError, match="live already"):
                self.store.replace(old.passage_id, new)
        else:
            batch = self.store.replace(old.passage_id, new)
            kept = {key: town for key, town in self.live.items() if key != old.passage_id}
            self._became(batch.id, kept | {new.passage_id: new})

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        batch_id = data.draw(st.sampled_from(sorted(self.states)))
        before = self.states.get(max((one for one in self.states if one < batch_id), default=0), {})
        lost = (before.keys() - self.live.keys()) & self.purged
        if lost:
            with pytest.raises(CatalogError, match="purged"):
                self.store.rollback(batch_id)
            return
        report = self.store.rollback(batch_id)
        assert (report.restored, report.removed) == (len(before.keys() - self.live), len(self.live.keys() - before))
        self._became(report.batch_id, before)

    @rule(town=_town)
    def purge(self, town: Passage) -> None:
        ever = {key for state in self.states.values() for key in state}
        if town.passage_id not in ever:
            with pytest.raises(UnknownPassageError):
                self.store.remove([town.passage_id], purge=True)
            return
        report = self.store.remove([town.passage_id], purge=True)
        self.purged.add(town.passage_id)
        self._became(report.batch_id, {key: one for key, one in self.live.items() if key != town.passage_id})

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = open_store(self.folder / "kb", self.models)

    @invariant()
    def the_store_is_what_the_dictionary_says(self) -> None:
        assert {one.passage_id: one.passage.text for one in self.store.passages()} == {
            key: town.text for key, town in self.live.items()
        }
        found = {hit.passage_id for hit in self.store.retrieve("Which town has a mill?")}
        assert found == self.live.keys()
        assert disagreements(self.store) == leftovers(self.store) == []
        assert self.store.verify().problems == ()

    def _became(self, batch_id: int | None, live: dict[str, Passage]) -> None:
        self.live = live
        self.purged -= live.keys()
        if batch_id is not None:
            self.states[batch_id] = live

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)


def test_histories_of_edits_leave_what_a_dictionary_would_hold(one_thread: None) -> None:
    Histories.models = make_models()
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Histories,
        settings=settings(
            max_examples=4, stateful_step_count=8, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
