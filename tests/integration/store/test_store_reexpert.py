"""Changing over to another hypernetwork: beside the readers, interrupted, undone, and with what changes meanwhile."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from knowstore.bank import bank_names
from knowstore.config import BankConfig, ModelConfig
from knowstore.errors import ConfigError, PassageError
from knowstore.records import Passage
from knowstore.store import KnowledgeStore

Open = Callable[..., KnowledgeStore]
Count = Callable[[], int]
QUESTION = "When was Rome founded?"
TENSORS = BankConfig(codec="float16")  # which tell by their form who made them, as latents do not


def _said(store: KnowledgeStore) -> object:
    answer = store.ask(QUESTION)
    return answer.text, [(one.passage_id, one.weight) for one in answer.experts]


def _forms(store: KnowledgeStore) -> set[str]:
    bank = store._tables.bank()
    return {expert.form for expert in bank.iter_encoded()}


def test_a_store_goes_over_to_another_hypernetwork_and_back(
    open_store: Open, facts: list[Passage], pooled: ModelConfig, n_generated: Count
) -> None:
    store = open_store(bank=TENSORS)
    store.add(facts[:3])
    store.remove([facts[2].passage_id])
    before = _said(store)
    n_generated()

    other = open_store(models=pooled)
    report = other.reexpert()
    assert (report.generated, report.reused, n_generated()) == (3, 0, 3)
    assert (other.verify().problems, _forms(other)) == ((), {"factors"})
    other.ask(QUESTION)
    assert other.rollback(2).restored == 1
    with pytest.raises(ConfigError, match="knowstore reexpert"):
        store.ask(QUESTION)
    assert (other.reexpert().generated, n_generated()) == (0, 0)

    other.remove([facts[2].passage_id])
    other.add([facts[4]])
    n_generated()
    undone = other.reexpert(is_undone=True)
    assert (undone.generated, undone.reused, undone.previous) == (1, 3, report.fingerprint)
    other.remove([facts[4].passage_id])
    assert (_said(other), _forms(other), other.verify().problems) == (before, {"neurons"}, ())
    with pytest.raises(ConfigError, match="undone already"):  # so a killed undo can be run again
        other.reexpert(is_undone=True)
    assert _said(open_store()) == before
    again = open_store(models=pooled)
    assert again.reexpert().fingerprint == report.fingerprint
    assert (again.reexpert(is_undone=True).previous, _said(open_store())) == (report.fingerprint, before)


def test_readers_go_on_while_experts_are_made_and_follow_when_they_named_no_models(
    open_store: Open, facts: list[Passage], pooled: ModelConfig, cache_dir: Path
) -> None:
    store = open_store()
    store.add(facts[:2])
    before = _said(store)
    reading = open_store(models=None)
    seen: list[object] = []
    writing = open_store(models=pooled, on_progress=lambda *_: seen.append(_said(reading)))
    writing.reexpert()
    assert seen
    assert set(map(str, seen)) == {str(before)}
    assert _said(reading) == _said(writing)


def test_writers_that_named_no_models_follow_as_well(
    open_store: Open, facts: list[Passage], pooled: ModelConfig
) -> None:
    open_store(bank=TENSORS).add(facts[:2])
    writing, undoing = open_store(models=None), open_store(models=None)
    other = open_store(models=pooled)
    other.reexpert()
    writing.add([facts[2]])
    assert (_forms(writing), writing.verify(repair=True).problems) == ({"factors"}, ())
    assert undoing.reexpert().generated == 0  # changes nothing back
    assert _forms(open_store(models=None)) == {"factors"}


_KILLED = """
from knowstore._loaded import LoadedModels
generate, n = LoadedModels.generate, 0
def dying(self, *arguments, **options):
    global n
    n += 1
    if n > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(self, *arguments, **options)
LoadedModels.generate = dying
import knowstore._encoding
knowstore._encoding.CHUNK = 2
store.models = store.models.with_config(ModelConfig(**{**store.catalog.setting("models"), "hypernetwork": sys.argv[1]}))
store.reexpert()
"""


def test_a_killed_change_leaves_the_store_as_it_was_and_goes_on_where_it_was(
    open_store: Open,
    facts: list[Passage],
    pooled: ModelConfig,
    n_generated: Count,
    start_python: Callable[..., subprocess.Popen[str]],
) -> None:
    store = open_store()
    store.add(facts[:4])
    before = _said(store)
    process = start_python(_KILLED, pooled.hypernetwork)
    _, errors = process.communicate(timeout=280)
    assert process.returncode < 0, errors
    assert (_said(store), open_store().verify().problems) == (before, ())
    n_generated()
    report = open_store(models=pooled).reexpert()
    assert (report.generated, report.reused, n_generated()) == (2, 2, 2)


def _lose_a_manifest(folder: Path, **_: object) -> None:
    """What a kill leaves of the deletion of a folder."""
    for path in folder.rglob("*.manifest"):
        path.unlink()


def test_what_kills_leave_of_making_and_dropping_a_bank_stands_in_no_writers_way(
    open_store: Open, facts: list[Passage], pooled: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store().add(facts[:2])
    store = open_store(models=pooled)
    begun = store.layout.tables / f"experts_{store.models.fingerprints['experts']}.lance"
    (begun / "_transactions").mkdir(parents=True)  # LanceDB writes these first
    (begun / "_transactions" / "0.txn").write_bytes(b"x")
    assert store.reexpert().generated == 2
    with monkeypatch.context() as killed:
        killed.setattr("shutil.rmtree", _lose_a_manifest)
        store.drop_previous()
    assert open_store(models=pooled).drop_previous() == 0
    assert sorted(path.name for path in store.layout.folder.rglob("*.lance") if path.is_dir()) == [
        begun.name, "passages.lance",
    ]  # fmt: skip
    assert store.verify().clean


def test_what_is_purged_is_purged_from_every_bank_and_the_old_one_can_be_dropped(
    open_store: Open, facts: list[Passage], tiny_models: ModelConfig, pooled: ModelConfig
) -> None:
    open_store().add(facts[:3])
    store = open_store(models=pooled)
    assert store.kept_banks() == []
    store.reexpert()
    store.remove([facts[0].passage_id], purge=True)
    needle = facts[0].passage_id.encode()
    for file in store.layout.tables.rglob("*"):
        assert file.is_dir() or needle not in file.read_bytes()
    assert len(bank_names(str(store.layout.tables))) == 2
    [kept] = store.kept_banks()
    assert (kept.name, kept.hypernetwork, kept.llm) == ("experts", tiny_models.hypernetwork, tiny_models.llm)
    assert 0 < kept.size_bytes < store.stats().bytes["experts"]
    assert store.drop_previous() == 1
    assert store.kept_banks() == []
    assert (bank_names(str(store.layout.tables)), store.verify().problems) == ([store._tables.bank().name], ())
    with pytest.raises(ConfigError, match="no other"):
        store.reexpert(is_undone=True)
    assert store.stats().experts == 2


def test_what_cannot_be_changed_over_is_refused(
    open_store: Open, facts: list[Passage], tiny_models: ModelConfig, tiny_llm_dir: Path
) -> None:
    store = open_store()
    with pytest.raises(PassageError, match="no passage"):
        store.reexpert()
    store.add(facts[:1])
    with pytest.raises(ConfigError, match="no other"):
        store.reexpert(is_undone=True)
    other = open_store(models=replace(tiny_models, retriever=str(tiny_llm_dir)))
    with pytest.raises(ConfigError, match="retriever"):
        other.reexpert()
    assert store.verify().problems == ()
