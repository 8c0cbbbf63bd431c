"""Two processes that `torchrun` starts train one model: as one process would with all their batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from knowstore.config import ModelConfig
from knowstore.errors import TrainingError
from knowstore.experts import FrozenLLM
from knowstore.training import Ranks, joined_ranks
from knowstore.training.hypernetwork import _shared_out
from tests.two_ranks import SETTINGS, trained

ROOT = Path(__file__).parents[3]
NAMES = ("Rome", "Lyon", "Ostia", "Tiber", "Saône", "Remus", "Paris", "Romulus")


@dataclass(frozen=True)
class Ran:
    """What two processes left: weights and steps of each run, and what `knowstore` wrote to stdout."""

    folder: Path
    stdout: str

    def weights(self, rank: int, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / str(rank) / f"{name}.safetensors")

    def told(self, rank: int) -> dict[str, int]:
        found: dict[str, int] = json.loads((self.folder / str(rank) / "told.json").read_text("utf-8"))
        return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of eight passages of two sentences with two questions each."""
    file = tmp_path_factory.mktemp("ranks") / "qa.jsonl"
    rows = []
    for number, name in enumerate(NAMES):
        passage = {"title": name, "text": f"{name} lies on the river {number}. It was founded by {NAMES[number - 1]}."}
        rows.append({"question": f"Where does {name} lie?", "answers": [f"the river {number}"], "passage": passage})
        rows.append({"question": f"Who founded {name}?", "answers": [NAMES[number - 1]], "passage": passage})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@pytest.fixture(scope="module")
def ran(data: Path, tiny_models: ModelConfig) -> Ran:
    names = ("llm", "retriever", "reranker", "hypernetwork", "device", "dtype")
    models = {f"KNOWSTORE_{name.upper()}": str(getattr(tiny_models, name)) for name in names}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tests.two_ranks"]
    done = subprocess.run(
        [*command, str(data.parent)], cwd=ROOT, env=os.environ | models | {"OMP_NUM_THREADS": "1"}, check=False,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Ran(data.parent, done.stdout)


def test_two_processes_end_with_the_same_weights(ran: Ran) -> None:
    for name in ("whole", "cut", "clock"):
        first, second = ran.weights(0, name), ran.weights(1, name)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items()), name


def test_two_processes_train_as_one_with_all_their_batches(
    ran: Ran, data: Path, tiny_llm: FrozenLLM, tiny_hypernetwork_dir: Path, tmp_path: Path
) -> None:
    seen: list[float] = []
    alone, kept = trained(
        SETTINGS, tiny_llm, tiny_hypernetwork_dir, data, tmp_path, on_progress=lambda one: seen.append(one.loss)
    )
    together = ran.weights(0, "whole")
    for name, tensor in alone.own_tensors().items():
        torch.testing.assert_close(
            together[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    log = (ran.folder / "0" / "whole" / "log.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["loss"] for line in log] == pytest.approx(seen, rel=1e-4)
    assert kept.step == ran.told(0)["whole"] == 6


def test_a_run_of_two_that_was_cut_off_ends_as_one_that_was_not(ran: Ran) -> None:
    assert ran.told(0)["interrupted"] == 1
    whole, cut = ran.weights(0, "whole"), ran.weights(0, "cut")
    assert all(torch.equal(tensor, cut[key]) for key, tensor in whole.items())


def test_the_first_alone_writes(ran: Ran) -> None:
    assert {file.name for file in (ran.folder / "0" / "whole").iterdir()} == {"log.jsonl", "checkpoint"}
    assert not (ran.folder / "1" / "whole").exists()
    steps = [json.loads(line)["step"] for line in (ran.folder / "0" / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_clock_of_the_first_ends_the_run_of_both(ran: Ran) -> None:
    assert ran.told(0)["clock"] == ran.told(1)["clock"] >= 1  # by its own the second would have taken no step


def test_the_command_trains_in_both_and_speaks_in_the_first(ran: Ran) -> None:
    records: list[dict[str, Any]] = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert [record["steps"] for record in records] == [2]
    assert (ran.folder / "cli" / "model.safetensors").exists()


def test_batches_are_shared_out_evenly_or_not_at_all() -> None:
    assert _shared_out(None, Ranks(0, 3)) == 3
    assert _shared_out(6, Ranks(1, 3)) == 6
    with pytest.raises(TrainingError, match="4 batches a step for 3 processes"):
        _shared_out(4, Ranks(0, 3))


def test_without_torchrun_a_process_is_alone() -> None:
    with joined_ranks("cpu") as ranks:
        assert ranks == Ranks()
        assert ranks.of_first("its own") == "its own"
