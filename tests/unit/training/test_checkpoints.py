"""A checkpoint is there whole, whatever happens while the next one is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from knowstore.training import checkpoints
from knowstore.training.checkpoints import read_checkpoint, write_checkpoint


@pytest.mark.parametrize("next_step", [3, 4])
def test_a_checkpoint_that_dies_while_it_is_written_leaves_the_one_before(
    next_step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(tensors: object, path: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    write_checkpoint(tmp_path, 3, {"step": 3}, {"weights/w": weight}, optimizer)
    monkeypatch.setattr(checkpoints, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, next_step, {"step": next_step}, {"weights/w": weight}, optimizer)
    monkeypatch.undo()
    kept = read_checkpoint(tmp_path)
    assert kept is not None
    assert kept.described["step"] == 3
    assert torch.equal(kept.of("weights")["w"], weight)
    write_checkpoint(tmp_path, next_step, {"step": next_step}, {"weights/w": weight}, optimizer)
    assert {file.name for file in tmp_path.iterdir()} == {"run.json", f"step-{next_step}.safetensors"}
