"""The most memory that a process had in use during a `with` block."""

from __future__ import annotations

import re
import sys
from pathlib import Path


class PeakMemory:
    """`bytes` after the block: the peak of CUDA's allocations where the LLM is there, else of resident memory.

    Resident memory is read from Linux's /proc; elsewhere `bytes` is None.
    """

    def __init__(self, device: str) -> None:
        self.is_cuda = device.startswith("cuda")
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.is_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        return self

    def __exit__(self, *_error: object) -> None:
        if self.is_cuda:
            import torch

            self.bytes = torch.cuda.max_memory_allocated()
        elif sys.platform == "linux":
            found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            self.bytes = int(found.group(1)) * 1024 if found else None
