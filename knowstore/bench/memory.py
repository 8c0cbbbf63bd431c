"""The most memory that a process had in use during a `with` block."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

_RESET = Path("/proc/self/clear_refs")  # 5 written there resets the peak of resident memory


class PeakMemory:
    """`bytes` after the block: the peak of CUDA's allocations where the LLM is there, else of resident memory.

    Resident memory is read from Linux's /proc; where its peak cannot be reset, `bytes` is None.
    """

    def __init__(self, device: str) -> None:
        self.is_cuda = device.startswith("cuda")
        self.is_reset = False
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.is_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):
                _RESET.write_text("5")
                self.is_reset = True
        return self

    def __exit__(self, *_error: object) -> None:
        if self.is_cuda:
            import torch

            self.bytes = torch.cuda.max_memory_allocated()
        elif self.is_reset:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            self.bytes = int(found.group(1)) * 1024 if found else None
