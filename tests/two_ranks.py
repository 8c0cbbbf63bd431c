"""What `torchrun --nproc-per-node 2 -m tests.two_ranks FOLDER` runs in each of two processes: tiny training runs, whose
weights and steps each process keeps in `FOLDER/RANK`, and then `knowstore train hypernetwork`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from knowstore.encoders import load_base
from knowstore.experts import FrozenLLM, TokensConfig, TokensHypernetwork, load_hypernetwork, load_llm
from knowstore.sources import sentence_spans
from knowstore.training import (
    Ranks,
    TrainingConfig,
    TrainingProgress,
    joined_ranks,
    load_questions,
    train_hypernetwork,
)
from knowstore.training.hypernetwork import _Loop

SETTINGS = TrainingConfig(
    batch_questions=3, batches_per_step=2, learning_rate=5e-3, warmup=2, pointing_share=0.5, static_steps=1,
    n_held_out=2, n_generated=2, validate_every=3, checkpoint_every_s=0.0, steps=6,
)  # fmt: skip


def trained(
    settings: TrainingConfig,
    llm: FrozenLLM,
    hypernetwork: Path,
    data: Path,
    folder: Path,
    ranks: Ranks | None = None,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> tuple[TokensHypernetwork, TrainingProgress]:
    """A new hypernetwork of the sizes of another, trained on the questions of a file."""
    config = load_hypernetwork(hypernetwork).config
    assert isinstance(config, TokensConfig)
    torch.manual_seed(0 if ranks is None else ranks.rank)  # the first one's weights count
    fresh = TokensHypernetwork(replace(config, trained_steps=0), load_base(config.base))
    rows = load_questions([data], sentence_spans)
    return fresh, train_hypernetwork(fresh, llm, rows, settings, folder, ranks=ranks, on_progress=on_progress)


def main(folder: Path) -> None:
    """All runs of one of the processes, the models' directories given in the environment as to `knowstore`."""
    torch.set_num_threads(1)
    llm = load_llm(Path(os.environ["KNOWSTORE_LLM"]))
    hypernetwork, data = Path(os.environ["KNOWSTORE_HYPERNETWORK"]), folder / "qa.jsonl"
    told: dict[str, int] = {}
    with joined_ranks("cpu") as ranks:
        own = folder / str(ranks.rank)

        def run(name: str, settings: TrainingConfig = SETTINGS) -> None:
            fresh, kept = trained(settings, llm, hypernetwork, data, own / name, ranks)
            save_file({key: t.clone() for key, t in fresh.own_tensors().items()}, own / f"{name}.safetensors")
            told[name] = kept.step

        own.mkdir()
        run("whole")
        with patch.object(_Loop, "goes_on", _interrupting):
            try:
                run("cut")
            except KeyboardInterrupt:
                told["interrupted"] = 1
        run("cut")
        by_time = replace(SETTINGS, steps=None, minutes=0.02, patience=5)
        with nullcontext() if ranks.is_first else patch.object(_Loop, "seconds", 1e9):  # a clock that nobody asks
            run("clock", by_time)
        (own / "told.json").write_text(json.dumps(told), "utf-8")
        from knowstore.cli.app import app

        how = ["--steps", "2", "--batch-questions", "3", "--layer", "1"]
        app(["train", "hypernetwork", "--data", str(data), *how, "--output", str(folder / "cli"), "--json"])


def _interrupting(loop: _Loop) -> bool:
    """`goes_on` of a run that is cut off after its fourth step, in all processes."""
    if loop.done == 4:
        raise KeyboardInterrupt
    loop.begun = loop.ranks.of_first(loop.fraction)
    return loop.begun < 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
