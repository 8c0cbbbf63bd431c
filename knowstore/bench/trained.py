"""What the experts of a hypernetwork that was just trained carry, and runs over several of them that go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from knowstore._loaded import OnProgress
from knowstore.bench.controls import open_benches
from knowstore.bench.scoring import share
from knowstore.config import ModelConfig
from knowstore.evaluation import exact_match, token_f1
from knowstore.training import TrainingProgress

Rows = list[dict[str, Any]]
_SCORES = {"em": exact_match, "f1": token_f1}


def gains(
    folder: Path, data: Sequence[Path], models: ModelConfig, limit: int, seed: int, max_tokens: int,
    on_progress: OnProgress | None,
) -> Iterator[tuple[dict[str, Any], dict[str, list[float]]]]:  # fmt: skip
    """How questions are answered with experts of the hypernetwork in `folder`, the right passage's and another's.

    Args:
        data: QA files, of each of which up to `limit` questions are asked, drawn with `seed`.
        models: the other models.

    Yields: for each file {data, n, gold_em, shuffled_em, em_gain, and the same of f1}, each score with its bootstrap
        95 % interval under `_ci`: gains are gold minus shuffled on the same questions. And what makes up those of gold,
        `em` and `f1` of each question.

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: fewer than two questions.
    """
    asked = replace(models, hypernetwork=str(folder))
    for bench in open_benches(data, asked, limit, seed, max_tokens, on_progress):
        kind = bench.models.hypernetwork.config.kind
        everything = list(range(len(bench.cases)))
        accepted = [case.answers for case in bench.cases]
        texts = {
            "gold": bench.answers(kind, everything, list(everything)),
            "shuffled": bench.answers(kind, everything, list(bench.others)),
        }
        row: dict[str, Any] = {"data": bench.name, "n": len(everything)}
        golds: dict[str, list[float]] = {}
        for name, score in _SCORES.items():
            each = {
                control: [float(score(text, answers)) for text, answers in zip(some, accepted, strict=True)]
                for control, some in texts.items()
            }
            differences = [gold - shuffled for gold, shuffled in zip(each["gold"], each["shuffled"], strict=True)]
            for control, values in each.items():
                row |= share(f"{control}_{name}", values, seed)
            row |= share(f"{name}_gain", differences, seed)
            golds[name] = each["gold"]
        yield row, golds


def percent_shown(label: str, on_progress: OnProgress | None) -> Callable[[TrainingProgress], None]:
    """What shows the percent of a training that are done under a label."""

    def show(one: TrainingProgress) -> None:
        if on_progress is not None:
            on_progress(f"{label} (%)", min(100, int(100 * one.fraction)), 100)

    return show


def kept_scores(folder: Path) -> Rows | None:
    """The rows that `keep_scores` wrote into a folder; None where it did not."""
    file = folder / "scores.json"
    return list(json.loads(file.read_text("utf-8"))) if file.exists() else None


def keep_scores(folder: Path, rows: Rows) -> Rows:
    """Write rows into a folder, whole or not at all; gives them as `kept_scores` will."""
    temporary = folder / "scores.json.new"
    written = json.dumps(rows)
    temporary.write_text(written + "\n", "utf-8")
    temporary.replace(folder / "scores.json")
    return list(json.loads(written))


def digest_of(paths: Sequence[Path]) -> str:
    """Tells files from others, whatever they are called; one that cannot be read is left to its reader."""
    known = hashlib.sha256()
    for path in paths:
        with suppress(OSError):
            known.update(hashlib.sha256(path.read_bytes()).digest())
    return known.hexdigest()
