"""Experts and folders that somebody else made, to do harm."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from knowstore.config import GenerationConfig
from knowstore.errors import HypernetworkError
from knowstore.experts import (
    Amplitude,
    Expert,
    Experts,
    FrozenLLM,
    Prompt,
    combine,
    expert_output,
    generate,
    load_hypernetwork,
)

D = 32


def _expert(size: float) -> Expert:
    torch.manual_seed(0)
    return Expert("neurons", {"up": torch.randn(D, 4) * size, "down": torch.randn(4, D) * size}, (4,))


@pytest.mark.parametrize("size", [1e6, 1e18, 3e38])
def test_an_expert_of_absurd_size_is_held_to_the_bound_and_noted(tiny_llm: FrozenLLM, size: float) -> None:
    prompt = [Prompt("", "Question: Who?\nAnswer:")]
    made = combine([[(_expert(size), 1.0, None)]], device=tiny_llm.device, dtype=torch.float32, max_norm=1e-6)
    experts = replace(made, amplitude=Amplitude())
    bare = generate(tiny_llm, prompt, None, 1, GenerationConfig(max_tokens=4))
    assert generate(tiny_llm, prompt, experts, 1, GenerationConfig(max_tokens=4))[0].text == bare[0].text
    assert experts.amplitude is not None
    assert experts.amplitude.largest > 100 * 1e-6


def test_the_output_is_finite_whatever_an_expert_holds() -> None:
    x = torch.randn(1, 3, D)
    for size in (1.0, 1e10, 1e30, 3e38):
        experts = combine([[(_expert(size), 1.0, None)]], device=x.device, dtype=torch.float32, max_norm=5.0)
        out = expert_output(experts, x)
        assert out.isfinite().all()
        assert out.norm(dim=-1).max() < 5.01


def test_an_amplitude_that_saw_nothing_is_zero() -> None:
    assert (Amplitude().largest, Experts().amplitude) == (0.0, None)


def _header(size: int, header: dict[str, object]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", size or len(text)) + text


def _shape(folder: Path, shape: tuple[int, ...]) -> None:
    tensors = load_file(folder / "model.safetensors")
    first = sorted(tensors)[0]
    tensors[first] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors")


def _config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _linked(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")


def _numbers(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    first = next(name for name in sorted(tensors) if tensors[name].is_floating_point() and tensors[name].numel())
    tensors[first].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors")


def _piped(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a header of 2^62 bytes": lambda f: (f / "model.safetensors").write_bytes(_header(1 << 62, {})),
    "a tensor larger than its file": lambda f: (f / "model.safetensors").write_bytes(
        _header(0, {"inner.bias": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
    ),
    "no file but a pickle": _pickled,
    "a link to a device": _linked,
    "a pipe for a config": lambda f: _piped(f / "config.json"),
    "a pipe for weights": lambda f: _piped(f / "model.safetensors"),
    "another shape": lambda f: _shape(f, (3, 3)),
    "another number of tensors": lambda f: save_file({"x": torch.zeros(1)}, f / "model.safetensors"),
    "nan": lambda f: _numbers(f, float("nan")),
    "infinity": lambda f: _numbers(f, float("inf")),
    "a config nested too deeply": lambda f: (f / "config.json").write_text("[" * 100_000),
    "a config of many bytes": lambda f: (f / "config.json").write_text(" " * (1 << 21)),
    "a width of 2^40": lambda f: _config(f, width=1 << 40),
    "a width that is text": lambda f: _config(f, width="32"),
    "a rank below zero": lambda f: _config(f, rank=-1),
    "another key": lambda f: _config(f, __class__="os.system"),
    "a kind that is a path": lambda f: _config(f, kind="../../etc"),
    "an infinite bound": lambda f: (f / "config.json").write_text(
        (f / "config.json").read_text().replace('"max_norm": null', '"max_norm": Infinity')
    ),
    "sizes that multiply": lambda f: _config(f, width=1 << 24, rank=1 << 24, bottleneck=1 << 24),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_hypernetwork_folder_is_refused_before_anything_is_allocated(
    hostile: str, tiny_pooled_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_pooled_dir, tmp_path / "hypernetwork"))
    HOSTILE[hostile](folder)
    with pytest.raises(HypernetworkError, match="no hypernetwork that can be read"):
        load_hypernetwork(folder)
