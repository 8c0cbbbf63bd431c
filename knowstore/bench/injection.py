"""What ingest costs beside the model forwards that it cannot do without."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from knowstore._loaded import OnProgress
from knowstore.evaluation import median_ratio
from knowstore.records import Passage
from knowstore.store import KnowledgeStore

_WARM_UP = 8  # passages


@dataclass(frozen=True)
class _Call:
    """A forward of a whole module, as it was called."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: str
    autocast: torch.dtype | None

    def again(self) -> None:
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            self.module(*self.args, **self.kwargs)


def measure_ingest(
    store: KnowledgeStore,
    passages: Sequence[Passage],
    *,
    n_parts: int = 4,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Add passages to a new store in parts; after each, the forwards that it took are run again, and nothing else.

    Args:
        store: an empty one.
        passages: more than the eight that warm up and `n_parts`.

    Returns: {passages, passages_per_s, forwards_per_s}, and the ratio `ingest_over_pure_forwards` of seconds.
    """
    store.add(passages[:_WARM_UP])
    size = (len(passages) - _WARM_UP) // n_parts
    ingest, forwards = [], []
    for number in range(n_parts):
        part = passages[_WARM_UP + number * size :][:size]
        with _recorded(store.models.device) as calls:
            started = time.perf_counter()
            store.add(part)
            ingest.append(time.perf_counter() - started)
        forwards.append(_run_again(calls))
        if on_progress is not None:
            on_progress("ingesting", number + 1, n_parts)
    ratio, low, high = median_ratio(ingest, forwards, seed=seed)
    n = size * n_parts
    figures: dict[str, object] = {
        "passages": n, "passages_per_s": n / sum(ingest), "forwards_per_s": n / sum(forwards),
    }  # fmt: skip
    return figures, [{"name": "ingest_over_pure_forwards", "ratio": ratio, "low": low, "high": high}]


@contextmanager
def _recorded(device: str) -> Iterator[list[_Call]]:
    """The forwards of outermost modules within the block, in order."""
    calls: list[_Call] = []
    depth = 0

    def enter(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        nonlocal depth
        depth += 1

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: object) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            calls.append(_Call(module, args, kwargs, device, autocast))

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, with_kwargs=True)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _run_again(calls: Sequence[_Call]) -> float:
    """Seconds of the forwards alone."""
    started = time.perf_counter()
    with torch.inference_mode():
        for call in calls:
            call.again()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
