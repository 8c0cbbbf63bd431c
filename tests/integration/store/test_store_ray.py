"""Ingest, reexpert and answers on a Ray cluster: the same as in one process, whatever dies."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from knowstore import _encoding
from knowstore._loaded import LoadedModels
from knowstore._ray import Job, Worker, Workers
from knowstore.bank import bank_names
from knowstore.config import GenerationConfig, ModelConfig, RayConfig
from knowstore.errors import ConfigError, EngineError
from knowstore.records import Passage
from knowstore.store import KnowledgeStore

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Ray's own processes
pytest.importorskip("ray", reason="extra `ray` is not installed")
pytest.importorskip("lance", reason="extra `ray` is not installed")

ADDRESS = os.environ.get("RAY_ADDRESS")
Open = Callable[..., KnowledgeStore]
Write = Callable[[str, Sequence[Passage]], str]


@pytest.fixture(scope="module")
def towns() -> list[Passage]:
    """Forty passages of many lengths, about towns that are not."""
    sentences = [
        "It lies on the river Tiber!",
        "Romulus was its king.",
        "Who founded it?",
        "It is at the end of a fjord.",
    ]
    return [
        Passage(f"Town {i} was founded in {700 + i} BC. " + " ".join(sentences[: i % 5]), f"Town {i}", "towns")
        for i in range(40)
    ]


@contextmanager
def connected() -> Iterator[None]:
    """In the cluster of RAY_ADDRESS, else in one of our own; Ray gives a node 30 seconds to start, which may be too few
    on a busy machine."""
    import ray

    from knowstore import _ray

    for n_left in (2, 1, 0):
        try:
            _ray.connect(ray, RayConfig(2, ADDRESS))
            break
        except EngineError:
            gc.collect()
            if not n_left:
                pytest.skip("Ray does not start on this machine")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def cluster(one_thread: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """One cluster for all tests of this process, which `ingest` finds and leaves alone."""
    with suppress(pytest.skip.Exception):
        request.getfixturevalue("s3_url")  # before, so that workers find it in their environment
    with connected():
        yield


@pytest.fixture
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten chunks of four passages, each a share or two of some batches."""
    from knowstore import _ray_experts

    monkeypatch.setattr(_encoding, "CHUNK", 4)
    monkeypatch.setattr(_encoding, "_BATCH_TOKENS", 64)
    monkeypatch.setattr(_ray_experts, "_SHARE", 3)


def rows(store: KnowledgeStore) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every stored row of both tables by id, with all its bytes; each id is there once."""
    passages = [row for batch in store._tables.passages().iter_rows() for row in batch.to_pylist()]
    experts = list(store._tables.bank().iter_encoded())
    by_id = {row["id"]: row for row in passages}, {expert.passage_id: expert for expert in experts}
    assert (len(by_id[0]), len(by_id[1])) == (len(passages), len(experts))
    return by_id


def data_files(store: KnowledgeStore) -> tuple[set[str], set[str]]:
    """Names of the files with experts, those there are and those that the bank's latest version names."""
    import lance

    table = store.layout.tables / f"{store._tables.bank().name}.lance"
    named = {file.path for fragment in lance.dataset(str(table)).get_fragments() for file in fragment.data_files()}
    return {file.name for file in (table / "data").iterdir()}, named


def kill_one_worker(method: str) -> int:
    """End a worker, one that computes if any does, as the system does that has no memory left; gives its id."""
    ours = psutil.process_iter() if ADDRESS else psutil.Process().children(recursive=True)
    titles: dict[psutil.Process, str] = {}
    for process in ours:
        with suppress(psutil.Error):
            titles[process] = " ".join(process.cmdline())
    worker = max(
        (one for one in titles if "_Worker" in titles[one]), key=lambda one: f"_Worker.{method}" in titles[one]
    )
    worker.kill()
    return int(worker.pid)


def test_the_same_rows_as_in_one_process(
    open_store: Open, write_facts: Write, towns: list[Passage], small_shares: None, cluster: None
) -> None:
    path = write_facts("towns.jsonl", towns)
    alone, many = open_store("alone"), open_store("many")
    alone.ingest([path])
    report = many.ingest([path], ray=RayConfig(workers=2))
    assert (report.batch_id, report.passages_added) == (1, 40)
    assert rows(many) == rows(alone)
    assert many.verify().problems == ()


def test_a_lost_worker_costs_what_it_had_begun(
    open_store: Open, write_facts: Write, towns: list[Passage], small_shares: None, cluster: None
) -> None:
    path, killed = write_facts("towns.jsonl", towns), []

    def kill_one(stage: str, n: int, _: int | None) -> None:
        if stage.startswith("embedding") and not killed:
            killed.append(kill_one_worker("make"))

    alone, many = open_store("alone"), open_store("many", on_progress=kill_one)
    alone.ingest([path])
    report = many.ingest([path], ray=RayConfig(workers=2))
    assert (len(killed), report.passages_added) == (1, 40)
    assert rows(many) == rows(alone)
    assert many.verify().problems == ()
    there, named = data_files(many)
    assert there == named


@pytest.mark.skipif(
    ADDRESS is not None and "AWS_ENDPOINT_URL" not in os.environ,
    reason="workers of RAY_ADDRESS do not know the S3 server of the tests",
)
def test_workers_write_to_an_object_store(
    s3_url: str,
    tmp_path: Path,
    tiny_models: ModelConfig,
    cache_dir: Path,
    open_store: Open,
    write_facts: Write,
    towns: list[Passage],
    small_shares: None,
    cluster: None,
) -> None:
    path, alone = write_facts("towns.jsonl", towns), open_store("alone")
    alone.ingest([path])
    options = {"catalog_url": f"sqlite:///{tmp_path}/catalog.sqlite", "models": tiny_models, "cache_dir": cache_dir}
    with KnowledgeStore.open(f"{s3_url}/ray/{uuid.uuid4().hex}", **options) as many:
        many.ingest([path], ray=RayConfig(workers=2))
        assert rows(many) == rows(alone)
        assert many.verify().problems == ()


def test_a_killed_driver_leaves_what_was_committed_and_the_ingest_goes_on(
    open_store: Open,
    write_facts: Write,
    towns: list[Passage],
    n_generated: Callable[[], int],
    start_python: Callable[..., subprocess.Popen[str]],
) -> None:
    path = write_facts("towns.jsonl", towns)
    killed = start_python(
        "from knowstore import RayConfig, _encoding, _ray_experts\n"
        "_encoding.CHUNK, _encoding._BATCH_TOKENS, _ray_experts._SHARE = 4, 64, 3\n"
        "store._on_progress = lambda stage, n, _: stage[0] == 'e' and n > 20 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.ingest([sys.argv[1]], ray=RayConfig(2, os.environ.get('RAY_ADDRESS')))\n",
        path,
    )
    _, said = killed.communicate(timeout=240)
    assert killed.returncode == -signal.SIGKILL, said
    store = open_store()
    assert (store.passages(), store.verify().clean) == ([], True)
    report = store.ingest([path])
    assert report.passages_added == 40
    assert n_generated() <= 28  # of 40; the others were committed, in chunks of some more than 4
    assert {passage.passage_id for passage in store.passages()} == {passage.passage_id for passage in towns}
    assert store.verify().problems == ()


def test_a_change_is_undone_as_in_one_process_though_a_worker_is_lost(
    open_store: Open, towns: list[Passage], pooled: ModelConfig, small_shares: None, cluster: None
) -> None:
    killed: list[int] = []

    def kill_one(stage: str, n: int, _: int | None) -> None:
        if stage.startswith("generating") and not killed:
            killed.append(kill_one_worker("remake"))

    for folder in ("alone", "many"):
        open_store(folder).add(towns[:1])
        changed = open_store(folder, models=pooled)
        changed.reexpert()
        changed.add(towns[1:])
    alone, many = open_store("alone", models=pooled), open_store("many", models=pooled, on_progress=kill_one)
    alone.reexpert(is_undone=True)
    report = many.reexpert(is_undone=True, ray=RayConfig(workers=2))
    assert (len(killed), report.generated, report.reused) == (1, 39, 1)
    assert rows(many) == rows(alone)
    assert many.verify().problems == ()
    there, named = data_files(many)
    assert there == named


def test_a_change_that_ends_early_goes_on_where_it_was(
    open_store: Open,
    towns: list[Passage],
    pooled: ModelConfig,
    n_generated: Callable[[], int],
    small_shares: None,
    cluster: None,
) -> None:
    def end(stage: str, n: int, _: int | None) -> None:
        if stage.startswith("generating") and n > 20:
            raise KeyboardInterrupt

    store = open_store()
    store.add(towns)
    ended = open_store(models=pooled, on_progress=end)
    with pytest.raises(KeyboardInterrupt):
        ended.reexpert(ray=RayConfig(workers=2))
    assert (store.verify().problems, store.stats().experts) == ((), 40)
    n_generated()
    report = open_store(models=pooled).reexpert()
    assert report.generated + report.reused == 40
    assert n_generated() == report.generated <= 28  # the others were committed, in chunks of some more than 4


def test_many_questions_get_the_answers_of_one_process_though_a_worker_is_lost(
    open_store: Open, towns: list[Passage], monkeypatch: pytest.MonkeyPatch, cluster: None
) -> None:
    from knowstore import _ray_answers

    monkeypatch.setattr(_ray_answers, "_SHARE", 2)
    store, killed = open_store(), []
    store.add(towns)
    store.add([replace(towns[8], text=towns[8].text.replace("708", "1708"))])  # a newer twin of a live passage,
    store.rollback(cast(int, store.remove([towns[8].passage_id]).batch_id))  # as the catalog alone can tell now
    questions = [f"When was Town {i} founded{', and by whom' * (i % 3)}?" for i in range(12)]
    alone = store.ask_many(questions, batch_size=3)
    done = Workers.done

    def kill_one(self: Workers, method: str, tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        for made in done(self, method, tasks):
            if method == "choose" and not killed:
                killed.append(kill_one_worker("choose"))
            yield made

    monkeypatch.setattr(Workers, "done", kill_one)
    many = store.ask_many(questions, batch_size=3, ray=RayConfig(workers=2))
    assert [replace(one, timings_s={}) for one in many] == [replace(one, timings_s={}) for one in alone]
    assert any(hit.newer_twin for one in many for hit in one.hits)
    assert (len(killed), len({one.text for one in many}) > 1) == (1, True)
    assert "generate" in many[0].timings_s


def test_a_worker_with_other_models_refuses(tiny_models: ModelConfig, cache_dir: Path, one_thread: None) -> None:
    job = Job.of(LoadedModels(tiny_models, cache_dir=cache_dir), ("llm", "reranker"), "all")
    Worker(job).load()
    with pytest.raises(ConfigError, match="has another reranker than"):
        Worker(replace(job, digests={**job.digests, "reranker": "of other files"})).load()


def test_drawn_answers_are_refused(open_store: Open, facts: list[Passage]) -> None:
    store = open_store(generation=GenerationConfig(do_sample=True))
    store.add(facts[:1])
    with pytest.raises(ConfigError, match="drawn"):
        store.ask_many(["Who?"], ray=RayConfig())


def test_without_ray_it_says_what_to_install(
    open_store: Open, write_facts: Write, facts: list[Passage], pooled: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    store = open_store()
    with pytest.raises(ConfigError, match="Ray is not installed"):
        store.ingest([write_facts("facts.jsonl", facts)], ray=RayConfig())
    assert (store.batches(), store.layout.has_tables) == ([], False)
    store.add(facts[:1])
    other = open_store(models=pooled)
    with pytest.raises(ConfigError, match="Ray is not installed"):
        other.reexpert(ray=RayConfig())
    assert bank_names(str(store.layout.tables)) == ["experts"]
    with pytest.raises(ConfigError, match="Ray is not installed"):
        store.ask_many(["Who?"], ray=RayConfig())
