"""The most memory that something took: of the GPU, or of the process where Linux tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_PROCESS = Path("/proc/self")


def peak_bytes(action: Callable[[], object], device: str) -> int | None:
    """Run `action`; the bytes in use at its height beyond those in use before it.

    Args:
        action: what to run.
        device: `cuda` counts what PyTorch has allocated there, anything else the process's resident memory.

    Returns: None where the system does not tell.
    """
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return int(torch.cuda.max_memory_allocated()) - before
    try:
        (_PROCESS / "clear_refs").write_text("5", "ascii")  # the peak starts again from what is resident now
        before = _resident("VmRSS")
        action()
        return _resident("VmHWM") - before
    except OSError:
        action()
        return None


def _resident(name: str) -> int:
    line = next(line for line in (_PROCESS / "status").read_text("ascii").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
