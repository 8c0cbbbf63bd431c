"""Reading tensors that somebody else wrote: what the file says of itself is compared before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
_INTEGERS = frozenset({"I8", "I16", "I32", "I64", "U8", "BOOL"})


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file that is expected to hold exactly `shapes`.

    Raises:
        ValueError: other names or shapes, a number type that is not known, or numbers that are not finite.
        OSError, SafetensorError: no such file, or not of this format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing")
    with safe_open(path, framework="pt") as file:
        found = set(file.keys())
        if found != set(shapes):
            raise ValueError(f"it has {len(found)} tensors that are not the {len(shapes)} expected")
        for name, shape in shapes.items():
            described = file.get_slice(name)
            if tuple(described.get_shape()) != shape:
                raise ValueError(f"its tensor {name} is {tuple(described.get_shape())}, expected {shape}")
            if described.get_dtype() not in _FLOATS | _INTEGERS:
                raise ValueError(f"its tensor {name} holds numbers of type {described.get_dtype()}")
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in shapes}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values() if tensor.is_floating_point()):
        raise ValueError("its weights are not finite")
    return tensors
