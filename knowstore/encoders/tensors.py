"""Tensors in files: matrices in eight bits, and reading what somebody else wrote, where what the file says of itself is
compared before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
_INTEGERS = frozenset({"I8", "I16", "I32", "I64", "U8", "BOOL"})
_SCALE = ".scale"
_MAX_INT8 = 127


def int8_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices (M, N) as int8 beside `NAME.scale` (M, 1), the float32 step of each row; all else in float16."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            out[name] = tensor.half().contiguous()
            continue
        values = tensor.float()
        scale = (values.abs().amax(1, keepdim=True) / _MAX_INT8).clamp(min=torch.finfo(torch.float32).tiny)
        out[name] = (values / scale).round().to(torch.int8)
        out[name + _SCALE] = scale
    return out


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file that is expected to hold exactly `shapes`, each as it is or as `int8_tensors`
    wrote it.

    Raises:
        ValueError: other names or shapes, a number type that is not known, or numbers that are not finite.
        OSError, SafetensorError: no such file, or not of this format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing")
    with safe_open(path, framework="pt") as file:
        found = set(file.keys())
        scales = {name + _SCALE: (shape[0], 1) for name, shape in shapes.items() if len(shape) == 2}
        scales = {name: shape for name, shape in scales.items() if name in found and name not in shapes}
        if found != set(shapes) | set(scales):
            raise ValueError(f"it has {len(found)} tensors that are not the {len(shapes)} expected")
        for name, shape in (dict(shapes) | scales).items():
            described = file.get_slice(name)
            if tuple(described.get_shape()) != shape:
                raise ValueError(f"its tensor {name} is {tuple(described.get_shape())}, expected {shape}")
            if described.get_dtype() not in _FLOATS | _INTEGERS:
                raise ValueError(f"its tensor {name} holds numbers of type {described.get_dtype()}")
        tensors: dict[str, Tensor] = {
            name: file.get_tensor(name).float() * file.get_tensor(name + _SCALE).float()
            if name + _SCALE in scales
            else file.get_tensor(name)
            for name in shapes
        }
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values() if tensor.is_floating_point()):
        raise ValueError("its weights are not finite")
    return tensors
