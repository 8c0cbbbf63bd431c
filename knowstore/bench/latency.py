"""How long each stage of `ask` takes on a store, with nothing in memory and with everything there."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from knowstore._loaded import OnProgress
from knowstore.errors import ConfigError
from knowstore.records import Answer, Mode
from knowstore.store import KnowledgeStore


def run_ask(
    store: KnowledgeStore, questions: Sequence[str], *, mode: Mode = "experts", on_progress: OnProgress | None = None
) -> dict[str, object]:
    """Ask each question once with its experts read from disk, then once more with them in memory.

    Models are loaded before the first question, and that time is reported by itself.

    Returns: `load_s`, and `cold` and `warm`, each {stage: {"p50": seconds, "p95": seconds}}.

    Raises:
        ConfigError: no questions.
    """
    if not questions:
        raise ConfigError("no questions to ask", kept="nothing was measured", fix="give a file with questions")
    started = time.perf_counter()
    store.ask(questions[0], mode=mode)
    load_s = time.perf_counter() - started
    store.forget()
    passes: dict[str, list[Answer]] = {"cold": [], "warm": []}
    for position, question in enumerate(questions):
        for name in passes:
            passes[name].append(store.ask(question, mode=mode))
        if on_progress is not None:
            on_progress("asking", position + 1, len(questions))
    return {"n": len(questions), "mode": mode, "load_s": load_s} | {
        name: _percentiles(answers) for name, answers in passes.items()
    }


def _percentiles(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    stages = list(dict.fromkeys(stage for answer in answers for stage in answer.timings_s))
    out = {}
    for stage in stages:
        seconds = [answer.timings_s.get(stage, 0.0) for answer in answers]
        out[stage] = {f"p{share}": float(np.percentile(seconds, share)) for share in (50, 95)}
    return out
