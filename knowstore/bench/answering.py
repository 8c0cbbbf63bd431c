"""Answers by experts, by passages in the prompt and by the bare model, side by side at several numbers of passages."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from knowstore._loaded import OnProgress
from knowstore.bench.memory import PeakMemory
from knowstore.evaluation import median_ratio
from knowstore.experts import Prompt, generate
from knowstore.prompts import question_prompt
from knowstore.records import Mode
from knowstore.store import KnowledgeStore

Way = tuple[Mode | None, int]
"""A mode and how many passages it keeps; None is the bare model, which gets no passage."""

BARE: Way = (None, 0)


@dataclass(frozen=True)
class Taken:
    """What one answer took: seconds from its passages to its first token and to its end, the same from the question on,
    and the most bytes that were in use."""

    first_token_s: float
    total_s: float
    ask_first_token_s: float
    ask_total_s: float
    mount_s: float = 0.0
    peak_bytes: int | None = None


def measure_answers(
    store: KnowledgeStore,
    questions: Sequence[str],
    ks: Sequence[int],
    *,
    rounds: int,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Answer a question a round in every way, the ways in another order each time.

    Args:
        store: one with at least `max(ks)` passages, whose generation makes each answer equally long.
        questions: asked in turn.
        ks: numbers of passages.
        rounds: how often every way is measured.

    Returns: rows of {method, k, n, first_token_s, total_s, ask_first_token_s, ask_total_s, mount_s, tokens_per_s,
        peak_bytes}, medians, each of the seconds with its quartiles as `NAME_quartiles`; and ratios with their
        bootstrap 95 % intervals.
    """
    ways: list[Way] = [BARE, *(("experts", k) for k in ks), *(("rag", k) for k in ks)]
    taken: dict[Way, list[Taken]] = {way: [] for way in ways}
    drawn = random.Random(seed)
    for number in range(-1, rounds):  # the first round warms up
        question = questions[number % len(questions)]
        for way in drawn.sample(ways, len(ways)):
            one = _answer(store, question, way)
            if number >= 0:
                taken[way].append(one)
        if on_progress is not None:
            on_progress("answering", number + 1, rounds)
    n_tokens = store.generation.max_tokens
    rows = [_row(way, some, n_tokens) for way, some in taken.items()]
    return rows, _ratios(taken, ks, seed)


def _answer(store: KnowledgeStore, question: str, way: Way) -> Taken:
    with PeakMemory(store.models.device) as peak:
        seconds = _bare(store, question) if way == BARE else _asked(store, question, way)
    before = seconds["total"] - seconds["generate"] - seconds.get("experts", 0.0)
    first = seconds.get("experts", 0.0) + seconds["first_token"]
    total = seconds.get("experts", 0.0) + seconds["generate"]
    return Taken(first, total, before + first, before + total, seconds.get("experts", 0.0), peak.bytes)


def _asked(store: KnowledgeStore, question: str, way: Way) -> dict[str, float]:
    mode, k = way
    store.retrieval = replace(store.retrieval, top_k=k, n_candidates=max(k, store.retrieval.n_candidates))
    return store.ask(question, mode=mode or "experts").timings_s


def _bare(store: KnowledgeStore, question: str) -> dict[str, float]:
    started = time.perf_counter()
    [one] = generate(store.models.llm, [Prompt("", question_prompt(question))], None, 0, store.generation)
    seconds = time.perf_counter() - started
    return {"generate": seconds, "total": seconds, "first_token": one.first_token_s}


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
        experts: Way = ("experts", k)
        rag: Way = ("rag", k)
        add(f"ttft_rag_over_experts_k{k}", rag, experts, "first_token_s")
        add(f"total_rag_over_experts_k{k}", rag, experts, "total_s")
        add(f"ask_ttft_rag_over_experts_k{k}", rag, experts, "ask_first_token_s")
        add(f"ask_total_rag_over_experts_k{k}", rag, experts, "ask_total_s")
        add(f"experts_k{k}_over_bare", experts, BARE, "total_s")
    return found
