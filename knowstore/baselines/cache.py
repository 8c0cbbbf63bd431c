"""Tensors that a method prepares once, in a file of the cache directory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class TensorCache:
    """A file of named tensors; without a directory nothing is kept."""

    file: Path | None

    @classmethod
    def of(cls, cache_dir: Path | None, kind: str, described: Iterable[object]) -> TensorCache:
        """The file of what `described` tells from others of its `kind`."""
        if cache_dir is None:
            return cls(None)
        text = "\0".join(map(str, described))
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return cls(cache_dir / kind / f"{digest}.safetensors")

    def read(self) -> dict[str, Tensor] | None:
        """The tensors, on the CPU; None where there are none, or a damaged file."""
        if self.file is None or not self.file.is_file():
            return None
        try:
            return load_file(self.file)
        except (OSError, SafetensorError):
            return None

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors under their name in one step."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
        part.replace(self.file)
