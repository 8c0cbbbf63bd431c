"""States of the frozen blocks, computed once and kept on disk in bfloat16: memory-mapped, filled as needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class StateCache:
    """States (T_i, D) of N token sequences in one memory-mapped file.

    Args:
        path: file to use; one of the right size is taken up again, with what it holds.
        lengths: T_i of each sequence.
        compute: gives the states of the sequences that are asked for and missing, a list of (T_i, D).
    """

    def __init__(
        self, path: Path, lengths: Sequence[int], width: int, compute: Callable[[list[int]], list[Tensor]]
    ) -> None:
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        self._compute = compute
        shape = (int(self._offsets[-1]), width)
        path.parent.mkdir(parents=True, exist_ok=True)
        done = path.with_suffix(".done")
        is_there = path.exists() and path.stat().st_size == 2 * shape[0] * shape[1]
        self._states = np.memmap(path, np.int16, "r+" if is_there else "w+", shape=shape)
        is_there = is_there and done.exists() and done.stat().st_size == len(lengths)
        self._done = np.memmap(done, np.uint8, "r+" if is_there else "w+", shape=(len(lengths),))

    def get(self, indices: Sequence[int]) -> list[Tensor]:
        """States of the sequences `indices`, each (T_i, D) in bfloat16."""
        missing = sorted({index for index in indices if not self._done[index]})
        if missing:
            for index, states in zip(missing, self._compute(missing), strict=True):
                first, last = self._offsets[index], self._offsets[index + 1]
                self._states[first:last] = states.to(torch.bfloat16).view(torch.int16).cpu().numpy()
                self._done[index] = 1
        return [
            torch.from_numpy(np.array(self._states[self._offsets[i] : self._offsets[i + 1]])).view(torch.bfloat16)
            for i in indices
        ]
