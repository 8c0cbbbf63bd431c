"""Checkpoints of training runs: tensors and the optimiser's state as safetensors, and `run.json`, which makes them
count.

The tensors are written first and beside those before, so that a run that dies meanwhile goes on from these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What was kept: `described` in `run.json`, `tensors` by name, and the optimiser's state."""

    described: dict[str, Any]
    tensors: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]

    def of(self, group: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `group/`, without that."""
        return {name.removeprefix(f"{group}/"): t for name, t in self.tensors.items() if name.startswith(f"{group}/")}

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Give an optimiser of the same parameters the state that was kept."""
        optimizer.load_state_dict({"state": self.optimizer, "param_groups": optimizer.state_dict()["param_groups"]})


def write_checkpoint(
    folder: Path,
    step: int,
    described: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Keep the state of a run after `step` steps, in place of what was kept before.

    Args:
        described: what JSON can hold of it.
        tensors: by names of which none begins with `optimizer/`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = dict(tensors)
    for index, state in optimizer.state_dict()["state"].items():
        kept |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in state.items()}
    name = f"step-{step}.safetensors"
    written = folder / "tensors.new"  # a step that is kept again, as when a run has ended, is never half written
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in kept.items()}, written)
    written.replace(folder / name)
    temporary = folder / "run.json.new"
    temporary.write_text(json.dumps({"file": name, **described}), "utf-8")
    temporary.replace(folder / "run.json")
    for old in folder.glob("step-*.safetensors"):
        if old.name != name:
            old.unlink()


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """What is kept in a folder, None where there is nothing."""
    if not (folder / "run.json").exists():
        return None
    described: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    tensors: dict[str, Tensor] = {}
    optimizer: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / described["file"]).items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            optimizer.setdefault(int(index), {})[name] = tensor
        else:
            tensors[key] = tensor
    return Checkpoint(described, tensors, optimizer)
