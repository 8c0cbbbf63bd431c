"""The engine that runs models on the workers of a Ray cluster.

Workers are plain actors, not a Ray Data pipeline: that batches by rows, while an expert's numbers depend on the
tokens that share its batch, and these actors compute the very batches of `InProcess`. A worker writes the experts of a
share of passages as files beside the bank and returns their descriptions with the rows of the passages, which are
small; this process commits both, so that there is one writer as ever. Ray starts a worker that died again, and gives
it its share again; files that it left are in no version of the bank and go away in the end.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any

from knowstore import _encoding
from knowstore._encoding import Batches, embedded_rows, generated
from knowstore._loaded import LoadedModels
from knowstore.bank import EncodedExpert, ExpertBank, write_fragment
from knowstore.config import Codec, ModelConfig, RayConfig
from knowstore.errors import ConfigError, EngineError, KnowledgeStoreError
from knowstore.passages import PassageRow
from knowstore.records import Passage

_SHARE = 128  # passages that a worker is given at once, some seconds of work; a lost worker costs two of them
_AHEAD = 2  # shares that a worker has: one to compute, one so that it need not wait
_RETRIES = 3  # of a share whose worker dies
_OBJECT_STORE_BYTES = 256 * 1024 * 1024  # of a cluster of our own, for shares and rows on their way
_KEPT = "the store is as it was; what workers finished is taken up by the next ingest"

Share = list[Sequence[Passage]]


@dataclass(frozen=True)
class _Job:
    """What a worker must know: which models, where experts go and how they are kept; paths may be relative to
    `folder`."""

    models: ModelConfig
    allow_untrained: bool
    cache_dir: Path | None
    folder: str
    fingerprints: dict[str, str]
    uri: str
    bank: str
    codec: Codec
    batch_id: int


@dataclass(frozen=True)
class _Made:
    """A share done: rows to be written, and fragments of the bank to be committed."""

    rows: list[PassageRow]
    fragments: list[str]
    seconds: float


class _Worker:
    """An actor: the models, loaded once, and a core of its own."""

    def __init__(self, job: _Job) -> None:
        import torch

        torch.set_num_threads(1)
        with suppress(OSError):  # on another machine; what is relative to it cannot be found there
            os.chdir(job.folder)
        self._job = job
        self._models = LoadedModels(job.models, job.allow_untrained, cache_dir=job.cache_dir)

    def load(self) -> None:
        """Load the models, and refuse those that are not the driver's."""
        if self._models.fingerprints != self._job.fingerprints:
            other = [
                role for role, digest in self._models.fingerprints.items() if digest != self._job.fingerprints[role]
            ]
            raise ConfigError(
                f"a worker on {os.uname().nodename} has another {' and '.join(other)} than the process that ingests",
                kept=_KEPT,
                fix="install the same models on all machines, or name a folder that all of them share",
            )
        _ = self._models.retriever, self._models.hypernetwork

    def make(self, share: Share) -> _Made:
        """Embed the passages of a share and write their experts beside the bank."""
        started = time.perf_counter()
        self.load()
        job = self._job
        rows: list[PassageRow] = []
        experts: list[EncodedExpert] = []
        for batch in share:
            made = embedded_rows(self._models.retriever, batch)
            experts += [
                EncodedExpert.make(expert, job.codec, job.fingerprints["experts"], job.batch_id)
                for expert in generated(batch, [row.segments for row in made], self._models, job.codec)
            ]
            rows += made
        seconds = time.perf_counter() - started
        return _Made(rows, write_fragment(job.uri, job.bank, experts), seconds)


class RayEngine:
    """See `Engine`; its workers live as long as one `fill`."""

    def __init__(self, config: RayConfig, models: LoadedModels) -> None:
        """
        Raises:
            ConfigError: Ray is not installed.
        """
        self._ray = _ray()
        self._config, self._models = config, models
        self.model_seconds = 0.0

    def fill(
        self, batches: Batches, bank: ExpertBank, codec: Codec, batch_id: int, on_done: Callable[[int], None]
    ) -> Generator[list[PassageRow]]:
        """See `Engine`.

        Raises:
            EngineError: no cluster, or a share whose workers died again and again.
            ConfigError: a worker has other models than this process.
        """
        dtype = str(self._models.dtype).removeprefix("torch.")  # whatever each worker would choose by itself
        job = _Job(
            replace(self._models.config, dtype=dtype),  # type: ignore[arg-type]
            self._models.allow_untrained,
            self._models.cache_dir,
            str(Path.cwd()),
            self._models.fingerprints,
            bank.uri,
            bank.name,
            codec,
            batch_id,
        )
        with self._cluster() as (n_workers, resources):
            shares = _shares(batches)
            first = list(islice(shares, n_workers))  # no more workers than there is work for
            actor = self._ray.remote(max_restarts=-1, max_task_retries=_RETRIES, **resources)(_Worker)
            workers = [actor.remote(job) for _ in first]
            rows: list[PassageRow] = []
            fragments: list[str] = []
            for made in self._made(workers, chain(first, shares)):
                rows += made.rows
                fragments += made.fragments
                self.model_seconds += made.seconds
                on_done(len(made.rows))
                if len(rows) >= _encoding.CHUNK:
                    bank.commit_fragments(fragments, [row.passage.passage_id for row in rows])
                    yield rows
                    rows, fragments = [], []
            if rows:
                bank.commit_fragments(fragments, [row.passage.passage_id for row in rows])
                yield rows
        bank.sweep()

    def _made(self, workers: Sequence[Any], shares: Iterator[Share]) -> Iterator[_Made]:
        """Shares as they are done, in any order; each worker has the next one before it needs it."""
        running: dict[Any, Any] = {worker.load.remote(): worker for worker in workers}
        n_making, share = 0, next(shares, None)
        while n_making or share is not None:
            [done], _ = self._ray.wait(list(running), num_returns=1)
            worker = running.pop(done)
            made = self._result(done)
            for _ in range(_AHEAD if made is None else 1):
                if share is not None:
                    running[worker.make.remote(share)] = worker
                    n_making, share = n_making + 1, next(shares, None)
            if made is not None:
                n_making -= 1
                yield made

    def _result(self, reference: Any) -> _Made | None:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)  # type: ignore[no-any-return]
        except errors.RayTaskError as error:
            if isinstance(error.cause, KnowledgeStoreError):
                raise error.cause from error
            raise EngineError(
                f"a worker failed: {error.cause!r}", kept=_KEPT, fix="run it without --engine ray to see where it fails"
            ) from error
        except errors.RayError as error:
            raise EngineError(
                f"a worker died {_RETRIES + 1} times over the same passages: {error}",
                kept=_KEPT,
                fix="look whether the machines have memory enough for the models of every worker, and run it again",
            ) from error

    @contextmanager
    def _cluster(self) -> Iterator[tuple[int, dict[str, int]]]:
        """How many workers there are to be, and what each takes, while the cluster is connected to."""
        ray, config = self._ray, self._config
        is_ours = not ray.is_initialized()
        if is_ours:
            connect(ray, config)
        try:
            has = ray.cluster_resources()
            gpus = int(has.get("GPU", 0)) if _may_use_gpu(self._models.config) else 0
            n_most = gpus or int(has.get("CPU", 0))
            if not n_most:
                raise EngineError(
                    "the Ray cluster has no core to work on",
                    kept=_KEPT,
                    fix="start nodes with `ray start --num-cpus N`",
                )
            yield min(config.workers or n_most, n_most), {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
        finally:
            if is_ours:
                ray.shutdown()


def _may_use_gpu(models: ModelConfig) -> bool:
    return models.device in ("auto", "cuda")


def connect(ray: ModuleType, config: RayConfig) -> None:
    """Join the cluster at the address, or start one on this machine."""
    own: dict[str, Any] = {}
    if config.address is None:
        own = {
            "num_cpus": config.workers or _n_cores(),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lance warns of every fork; those of a start run other programs at once
            ray.init(address=config.address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # what Ray raises where no node answers in time is nothing more special
        ray.shutdown()
        where = "on this machine" if config.address is None else f"at {config.address}"
        raise EngineError(
            f"there is no Ray cluster {where}: {error}",
            kept="the store is as it was",
            fix="start one with `ray start --head` and name its address (set RAY_AUTH_MODE=token where it asks for a "
            "token), or leave out --ray-address",
        ) from error


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shares(batches: Iterable[Sequence[Passage]]) -> Iterator[Share]:
    """Batches in groups of some more than `_SHARE` passages."""
    share: Share = []
    for batch in batches:
        share.append(batch)
        if sum(map(len, share)) >= _SHARE:
            yield share
            share = []
    if share:
        yield share


def _ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or Ray reports to its makers
    try:
        import_module("ray.exceptions")
        return import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed",
            kept="nothing was changed",
            fix="run `pip install 'knowstore[ray]'`, or leave out --engine ray",
        ) from error
