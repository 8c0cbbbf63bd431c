"""A store of tiny models, files of facts to put into it, and what a reader can see of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from knowstore.records import Passage

if TYPE_CHECKING:
    from knowstore.config import ModelConfig
    from knowstore.store import KnowledgeStore

QUESTIONS = ("When was Rome founded?", "Where does Lyon lie?")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def open_store(tmp_path: Path, tiny_models: ModelConfig, cache_dir: Path) -> Iterator[Callable[..., KnowledgeStore]]:
    """Opens a store of the tiny models, `kb` unless another folder is named; all are closed at the end.

    The null option is off unless a number is given: what scores mean differs from reranker to reranker.
    """
    from knowstore import KnowledgeStore
    from knowstore.config import RetrievalConfig

    with ExitStack() as stack:

        def open_(folder: str | Path = "kb", *, is_relative: bool = False, **options: Any) -> KnowledgeStore:
            retrieval = options.get("retrieval", RetrievalConfig())
            if not isinstance(retrieval.null_threshold, float):
                retrieval = replace(retrieval, null_threshold=None)
            settings = {"models": tiny_models, "cache_dir": cache_dir, **options, "retrieval": retrieval}
            location = folder if is_relative else tmp_path / folder
            return stack.enter_context(KnowledgeStore.open(location, **settings))

        yield open_


@pytest.fixture
def pooled(tiny_models: ModelConfig, tiny_pooled_dir: Path) -> ModelConfig:
    """The tiny models with another hypernetwork."""
    return replace(tiny_models, hypernetwork=str(tiny_pooled_dir))


@pytest.fixture(scope="session")
def facts() -> list[Passage]:
    """Six passages about towns, from two sources, of one date each."""
    return [
        Passage("Rome was founded in 753 BC. It lies on the river Tiber.", "Rome", "italy", "2020-01-01"),
        Passage("Romulus was the first king of Rome.", "Romulus", "italy", "2020-06-15"),
        Passage("Lyon lies on the Rhône and the Saône.", "Lyon", "france", "2021-03-01"),
        Passage("The Rhône ends in the sea. It comes from a glacier.", "Rhône", "france", "2022-01-31"),
        Passage("Oslo lies at the end of a fjord.", "Oslo", "norway"),
        Passage("Quito lies on the slopes of Pichincha, near the equator.", "Quito", "ecuador", "2023-01-01"),
    ]


@pytest.fixture
def write_facts(tmp_path: Path) -> Callable[[str, Sequence[Passage]], str]:
    """Writes passages to a file of JSON lines and gives its path."""

    def write(name: str, passages: Sequence[Passage]) -> str:
        path = tmp_path / name
        rows = ({"title": one.title, "text": one.text, "date": one.date} for one in passages)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(path)

    return write


@pytest.fixture
def visible() -> Callable[[KnowledgeStore], object]:
    """All that a reader of a store gets: what is live, what is found, what is answered."""

    def look(store: KnowledgeStore) -> object:
        found = [[(hit.passage_id, hit.text, hit.score) for hit in store.retrieve(question)] for question in QUESTIONS]
        answers = [store.ask(question) for question in QUESTIONS] if store.passages() else []
        said = [(one.text, [(expert.passage_id, expert.weight) for expert in one.experts]) for one in answers]
        live = sorted((one.passage_id, one.passage.text) for one in store.passages())
        return sorted(store.catalog.live_placements()), live, found, said

    return look


@pytest.fixture
def n_generated(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many experts were generated since it was asked last."""
    from knowstore._loaded import LoadedModels

    counts: list[int] = []
    generate = LoadedModels.generate

    def counted(self: LoadedModels, passage_ids: Sequence[str], *arguments: Any, **options: Any) -> Any:
        counts.append(len(passage_ids))
        return generate(self, passage_ids, *arguments, **options)

    monkeypatch.setattr(LoadedModels, "generate", counted)

    def take() -> int:
        n = sum(counts)
        counts.clear()
        return n

    return take


@pytest.fixture
def start_python(tmp_path: Path, tiny_models: ModelConfig, cache_dir: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a Python program in another process; `store` is open in it, `arguments` are its `sys.argv[1:]`."""

    def start(program: str, *arguments: str, folder: str = "kb") -> subprocess.Popen[str]:
        opening = (
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from knowstore import KnowledgeStore, ModelConfig\n"
            f"models = ModelConfig(**{asdict(tiny_models)!r})\n"
            f"folder, cache_dir = {str(tmp_path / folder)!r}, Path({str(cache_dir)!r})\n"
            "store = KnowledgeStore.open(folder, models=models, cache_dir=cache_dir)\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", opening + program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return start
