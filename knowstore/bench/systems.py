"""What answers questions from passages, as `run_peers` measures it, each in a process of its own."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, cast

from knowstore.bench.memory import PeakMemory
from knowstore.config import GenerationConfig, ModelConfig, RetrievalConfig
from knowstore.errors import ConfigError
from knowstore.models import NO_READER, choose_device
from knowstore.records import Mode, Passage
from knowstore.store import KnowledgeStore

PromptName = Literal["own", "short"]
"""A system's own default prompt, or the short one of `knowstore.prompts`."""


@dataclass(frozen=True)
class SystemConfig:
    """What every system is made with: its folder, the models, how many passages answer, how long an answer may be."""

    folder: Path
    models: ModelConfig
    top_k: int
    max_tokens: int
    cache_dir: Path | None = None


class Told(NamedTuple):
    """The text of an answer, and the ids of the passages behind it."""

    text: str
    passage_ids: tuple[str, ...]


class Measured(NamedTuple):
    """What a call gave, its seconds, and the most bytes that its process had in use meanwhile."""

    told: Told | None
    seconds: float
    peak_bytes: int | None


class System(Protocol):
    """Passages go in, questions are answered from them."""

    def add(self, passages: Sequence[Passage]) -> None:
        """Take passages in; they can be found from then on."""
        ...

    def ask(self, question: str, prompt: PromptName) -> Told:
        """Answer a question."""
        ...


class StoreSystem:
    """A `KnowledgeStore`, asked in one mode with what `ask` serves; `short` is the only prompt that it has."""

    def __init__(self, config: SystemConfig, mode: Mode) -> None:
        self._mode = mode
        self._store = KnowledgeStore.open(
            config.folder, models=config.models, retrieval=RetrievalConfig(top_k=config.top_k),
            generation=GenerationConfig(max_tokens=config.max_tokens), cache_dir=config.cache_dir,
        )  # fmt: skip

    def add(self, passages: Sequence[Passage]) -> None:
        self._store.add(passages)

    def ask(self, question: str, prompt: PromptName) -> Told:
        answer = self._store.ask(question, mode=self._mode)
        return Told(answer.text, tuple(expert.passage_id for expert in answer.experts))


def experts(config: SystemConfig) -> System:
    """The store with experts mounted."""
    return StoreSystem(config, "experts")


def rag(config: SystemConfig) -> System:
    """The store with passages in the prompt, read with the tuned reader."""
    return StoreSystem(config, "rag")


def rag_zero_shot(config: SystemConfig) -> System:
    """The store with passages in the prompt and no reader."""
    return StoreSystem(replace(config, models=replace(config.models, reader=NO_READER)), "rag")


def hybrid(config: SystemConfig) -> System:
    """The store with experts mounted and passages in the prompt."""
    return StoreSystem(config, "hybrid")


def langchain(config: SystemConfig) -> System:
    """LangChain on LanceDB (extra `peers`)."""
    return cast(System, import_module("knowstore.bench.langchain_rag").LangChainSystem(config))


def llama_index(config: SystemConfig) -> System:
    """LlamaIndex on LanceDB (extra `peers`)."""
    return cast(System, import_module("knowstore.bench.llama_index_rag").LlamaIndexSystem(config))


class SystemProcess:
    """A system in a process of its own, so that what it holds in memory is its own; calls are measured there and wait
    for one another here."""

    def __init__(self, name: str, make: Callable[[SystemConfig], System], config: SystemConfig) -> None:
        self.name, self._make, self._config = name, make, config
        self._pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
        )

    def __enter__(self) -> SystemProcess:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def start(self) -> None:
        """Load what is imported and open the folder; models are loaded with the first call."""
        self._result(_start, self._make, self._config)

    def add(self, passages: Sequence[Passage]) -> Measured:
        """`System.add`, measured."""
        return self._result(_add, list(passages))

    def ask(self, question: str, prompt: PromptName) -> Measured:
        """`System.ask`, measured."""
        return self._result(_ask, question, prompt)

    def _result(self, call: Callable[..., Measured], *arguments: object) -> Measured:
        try:
            return self._pool.submit(call, *arguments).result()
        except BrokenProcessPool as error:
            raise ConfigError(
                f"the process of {self.name} ended before its answer",
                kept="nothing was measured",
                fix="look whether memory ran out: each system loads the models for itself; use a smaller one",
            ) from error


_running: list[tuple[System, str]] = []  # in its own process, the system and the device of its models


def _start(make: Callable[[SystemConfig], System], config: SystemConfig) -> Measured:
    _running[:] = [(make(config), choose_device(config.models.device))]
    return Measured(None, 0.0, None)


def _add(passages: Sequence[Passage]) -> Measured:
    return _measured(lambda system: system.add(passages))


def _ask(question: str, prompt: PromptName) -> Measured:
    return _measured(lambda system: system.ask(question, prompt))


def _measured(call: Callable[[System], Told | None]) -> Measured:
    [(system, device)] = _running
    with PeakMemory(device) as peak:
        started = time.perf_counter()
        told = call(system)
        seconds = time.perf_counter() - started
    return Measured(told, seconds, peak.bytes)
