"""Answers by experts, by passages in the prompt, by both and by the bare model, at several numbers of passages."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from knowstore._answering import Reader, Timer, prompt_of
from knowstore._loaded import OnProgress
from knowstore.bench.memory import PeakMemory
from knowstore.evaluation import median_ratio
from knowstore.experts import generate
from knowstore.records import Hit, Mode

Way = tuple[Mode | None, int]
"""A mode and how many passages it keeps; None is the bare model, which gets no passage."""

BARE: Way = (None, 0)
_MODES: tuple[Mode, ...] = ("experts", "hybrid", "rag")


@dataclass(frozen=True)
class Taken:
    """What one answer took: seconds of the search, those from the found passages to its first token and to its end,
    those of choosing and mounting among them, and the most bytes that were in use after the search."""

    search_s: float
    first_token_s: float
    total_s: float
    mount_s: float
    peak_bytes: int | None = None

    @property
    def ask_first_token_s(self) -> float:
        return self.search_s + self.first_token_s

    @property
    def ask_total_s(self) -> float:
        return self.search_s + self.total_s


def measure_answers(
    reader: Reader,
    questions: Sequence[str],
    ks: Sequence[int],
    *,
    rounds: int,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Answer a question a round in every way, the ways in another order each time; ways that keep equally many passages
    share one search.

    Args:
        reader: of a store with at least `max(ks)` passages; it proposes as many, uses all that it proposes, and its
            generation makes each answer equally long.
        questions: asked in turn.
        ks: numbers of passages.
        rounds: how often every way is measured.

    Returns: rows of {method, k, n, first_token_s, total_s, ask_first_token_s, ask_total_s, mount_s, tokens_per_s,
        peak_bytes}, medians, each of the seconds with its quartiles as `NAME_quartiles`; and ratios with their
        bootstrap 95 % intervals.
    """
    ways: list[Way] = [BARE, *((mode, k) for mode in _MODES for k in ks)]
    taken: dict[Way, list[Taken]] = {way: [] for way in ways}
    drawn = random.Random(seed)
    for number in range(-1, rounds):  # the first round warms up
        question = questions[number % len(questions)]
        searched = {(mode != "rag", k) for mode, k in ways if mode is not None}
        found = {one: _search(reader, question, *one) for one in drawn.sample(sorted(searched), len(searched))}
        for way in drawn.sample(ways, len(ways)):
            hits, search_s = found.get((way[0] != "rag", way[1]), ((), 0.0))
            one = _answer(reader, question, way, hits, search_s)
            if number >= 0:
                taken[way].append(one)
        if on_progress is not None:
            on_progress("answering", number + 1, rounds)
    n_tokens = reader.generation.max_tokens
    rows = [_row(way, some, n_tokens) for way, some in taken.items()]
    return rows, _ratios(taken, ks, seed)


def _search(reader: Reader, question: str, is_mounted: bool, k: int) -> tuple[list[Hit], float]:
    """What is found for a question of which k passages will be kept, and mounted or read alone, and the seconds that
    this takes."""
    started = time.perf_counter()
    hits = reader.retrieve(question, None, Timer(), n_best=k if is_mounted else 0)
    return hits, time.perf_counter() - started


def _answer(reader: Reader, question: str, way: Way, hits: Sequence[Hit], search_s: float) -> Taken:
    mode, k = way
    models = reader.models
    with PeakMemory(models.device) as peak:
        started = time.perf_counter()
        chosen = replace(reader, retrieval=replace(reader.retrieval, top_k=k)).weigh(hits) if k else []
        experts = reader.experts([chosen], mode or "experts")
        mount_s = time.perf_counter() - started
        prompt = prompt_of(question, () if mode is None else reader.read(chosen, mode))
        [one] = generate(models.llm, [prompt], experts, models.hypernetwork_config["layer"], reader.generation)
        total_s = time.perf_counter() - started
    return Taken(search_s, mount_s + one.first_token_s, total_s, mount_s, peak.bytes)


def _row(way: Way, taken: Sequence[Taken], n_tokens: int) -> dict[str, object]:
    row: dict[str, object] = {"method": way[0] or "bare", "k": way[1], "n": len(taken)}
    for name in ("first_token_s", "total_s", "ask_first_token_s", "ask_total_s", "mount_s"):
        quartiles = np.quantile([getattr(one, name) for one in taken], (0.25, 0.5, 0.75))
        row |= {name: float(quartiles[1]), f"{name}_quartiles": (float(quartiles[0]), float(quartiles[2]))}
    peaks = [one.peak_bytes for one in taken if one.peak_bytes is not None]
    rate = float(np.median([n_tokens / one.total_s for one in taken]))
    return row | {"tokens_per_s": rate, "peak_bytes": int(np.median(peaks)) if peaks else None}


def _ratios(taken: dict[Way, list[Taken]], ks: Sequence[int], seed: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []

    def add(name: str, above: Way, below: Way, figure: str) -> None:
        some = [[getattr(one, figure) for one in taken[way]] for way in (above, below)]
        ratio, low, high = median_ratio(*some, seed=seed)
        found.append({"name": name, "ratio": ratio, "low": low, "high": high})

    for k in ks:
        rag: Way = ("rag", k)
        modes: tuple[Mode, ...] = ("experts", "hybrid")
        for mode in modes:
            mounted: Way = (mode, k)
            add(f"ttft_rag_over_{mode}_k{k}", rag, mounted, "first_token_s")
            add(f"total_rag_over_{mode}_k{k}", rag, mounted, "total_s")
            add(f"ask_ttft_rag_over_{mode}_k{k}", rag, mounted, "ask_first_token_s")
            add(f"ask_total_rag_over_{mode}_k{k}", rag, mounted, "ask_total_s")
            add(f"{mode}_k{k}_over_bare", mounted, BARE, "total_s")
    return found
