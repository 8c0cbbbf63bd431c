"""Tensors in files: what eight bits keep of a matrix, and files that are not what they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from knowstore.encoders import int8_tensors, read_tensors

SHAPES = {"matrix": (3, 5), "vector": (4,)}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    matrix = torch.randn(3, 5) * torch.tensor([[1e-3], [1.0], [50.0]])
    matrix[1] = 0
    return {"matrix": matrix, "vector": torch.randn(4)}


def test_a_matrix_comes_back_to_half_a_step_of_each_row(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(int8_tensors(tensors), tmp_path / "file")
    read = read_tensors(tmp_path / "file", SHAPES)
    assert set(read) == set(SHAPES)
    steps = tensors["matrix"].abs().amax(1, keepdim=True) / 127
    assert bool(((read["matrix"] - tensors["matrix"]).abs() <= 0.5001 * steps).all())
    assert bool((read["matrix"][1] == 0).all())
    assert torch.equal(read["vector"], tensors["vector"].half())
    save_file(int8_tensors(read), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_tensors_as_they_are_read_as_before(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "file")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_tensors(tmp_path / "file", SHAPES).items())


def test_scales_that_do_not_fit_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    kept = int8_tensors(tensors)
    for name, tensor, message in (
        ("matrix.scale", torch.ones(5, 1), r"its tensor matrix.scale is \(5, 1\), expected \(3, 1\)"),
        ("matrix.scale", torch.full((3, 1), torch.inf), "its weights are not finite"),
        ("vector.scale", torch.ones(4, 1), "it has 4 tensors that are not the 2 expected"),
    ):
        save_file(kept | {name: tensor}, tmp_path / "file")
        with pytest.raises(ValueError, match=message):
            read_tensors(tmp_path / "file", SHAPES)
