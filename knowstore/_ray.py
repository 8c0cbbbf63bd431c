"""Workers on a Ray cluster: actors that hold models, each given its next task before it needs it.

They are plain actors, not a Ray Data pipeline: that batches by rows, while an expert's numbers, and an answer's, depend
on the tokens that share a batch, and these compute the very batches that one process computes. They read the store
and write at most files that are no part of it yet: this process commits, so that there is one writer as ever. Ray
starts a worker that died again, and gives it its tasks again.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from knowstore._loaded import LoadedModels
from knowstore.config import ModelConfig, RayConfig
from knowstore.errors import ConfigError, EngineError, KnowledgeStoreError

_AHEAD = 2  # tasks that a worker has: one to compute, one so that it need not wait
_RETRIES = 3  # of a task whose worker dies
_OBJECT_STORE_BYTES = 256 * 1024 * 1024  # of a cluster of our own, for tasks and results on their way


@dataclass(frozen=True)
class Job:
    """What every worker must know: which models, of which those of `digests` are needed and must be the driver's, and
    what an error says is kept; paths may be relative to `folder`."""

    models: ModelConfig
    allow_untrained: bool
    cache_dir: Path | None
    folder: str
    digests: dict[str, str]
    kept: str

    @classmethod
    def of(cls, models: LoadedModels, roles: Iterable[str], kept: str) -> Job:
        """A job that needs the models of some roles; nothing of them is loaded here."""
        dtype = str(models.dtype).removeprefix("torch.")  # whatever each worker would choose by itself
        return cls(
            replace(models.config, dtype=dtype),  # type: ignore[arg-type]
            models.allow_untrained,
            models.cache_dir,
            str(Path.cwd()),
            {role: models.digest(role) for role in roles},
            kept,
        )


class Worker:
    """An actor: the models, loaded once, and a core of its own."""

    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(1)
        with suppress(OSError):  # on another machine; what is relative to it cannot be found there
            os.chdir(job.folder)
        self._job = job

    def load(self) -> None:
        """Load the models, before there is anything to do."""
        _ = self.models

    @cached_property
    def models(self) -> LoadedModels:
        """The models that the job needs.

        Raises:
            ConfigError: they are not the driver's.
        """
        job = self._job
        models = LoadedModels(job.models, job.allow_untrained, cache_dir=job.cache_dir)
        other = [role for role, digest in job.digests.items() if models.digest(role) != digest]
        if other:
            raise ConfigError(
                f"a worker on {os.uname().nodename} has another {' and '.join(other)} than the process that began",
                kept=job.kept,
                fix="install the same models on all machines, or name a folder that all of them share",
            )
        for role in job.digests:
            getattr(models, role)
        return models


class Workers:
    """Actors of one kind, until the block of their cluster ends."""

    def __init__(self, ray: ModuleType, actors: Sequence[Any], kept: str) -> None:
        self._ray, self._actors, self._kept = ray, actors, kept

    def done(self, method: str, tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """What a method of the actors makes of tasks, as they are done, in any order.

        Raises:
            EngineError: a task failed, or the workers that had it died again and again.
            KnowledgeStoreError: what a worker raised.
        """
        remaining = iter(tasks)
        running: dict[Any, Any] = {actor.load.remote(): actor for actor in self._actors}
        loading, task = set(running), next(remaining, None)
        while len(running) > len(loading) or task is not None:
            [done], _ = self._ray.wait(list(running), num_returns=1)
            actor, result, was_loading = running.pop(done), self._result(done), done in loading
            for _ in range(_AHEAD if was_loading else 1):
                if task is not None:
                    running[getattr(actor, method).remote(*task)] = actor
                    task = next(remaining, None)
            if was_loading:
                loading.discard(done)
            else:
                yield result

    def _result(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, KnowledgeStoreError):
                raise error.cause from error
            raise EngineError(
                f"a worker failed: {error.cause!r}",
                kept=self._kept,
                fix="run it without --engine ray to see where it fails",
            ) from error
        except errors.RayError as error:
            raise EngineError(
                f"a worker died {_RETRIES + 1} times over the same task: {error}",
                kept=self._kept,
                fix="look whether the machines have memory enough for the models of every worker, and run it again",
            ) from error


@dataclass(frozen=True)
class Cluster:
    """A cluster that is connected to: how many workers of a job there may be, what each takes, and all there were."""

    ray: ModuleType
    job: Job
    n_workers: int
    resources: dict[str, int]
    actors: list[Any]

    def start(self, n: int, kind: type[Worker], *arguments: Any) -> Workers:
        """`n` workers of a kind, made with the job and `arguments`."""
        actor = self.ray.remote(max_restarts=-1, max_task_retries=_RETRIES, **self.resources)(kind)
        started = [actor.remote(self.job, *arguments) for _ in range(n)]
        self.actors.extend(started)
        return Workers(self.ray, started, self.job.kept)


@contextmanager
def cluster(config: RayConfig, job: Job) -> Iterator[Cluster]:
    """The cluster that is connected to already, that at the address, or one of our own that ends with the block.

    Raises:
        ConfigError: Ray is not installed.
        EngineError: there is no such cluster, or it has no core.
    """
    ray = imported()
    is_ours = not ray.is_initialized()
    if is_ours:
        connect(ray, config)
    actors: list[Any] = []
    try:
        has = ray.cluster_resources()
        gpus = int(has.get("GPU", 0)) if job.models.device in ("auto", "cuda") else 0
        n_most = gpus or int(has.get("CPU", 0))
        if not n_most:
            raise EngineError(
                "the Ray cluster has no core to work on",
                kept=job.kept,
                fix="start nodes with `ray start --num-cpus N`",
            )
        resources = {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
        yield Cluster(ray, job, min(config.workers or n_most, n_most), resources, actors)
    except BaseException:
        for actor in [] if is_ours else actors:  # the error's traceback keeps them, and they their cores
            with suppress(ray.exceptions.RayError):
                ray.kill(actor)
        raise
    finally:
        if is_ours:
            ray.shutdown()


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


def imported() -> ModuleType:
    """Ray itself.

    Raises:
        ConfigError: it is not installed.
    """
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


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
