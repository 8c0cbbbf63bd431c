"""One setting each for the device and the precision of the models, without silent fallback."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from knowstore.errors import ConfigError

if TYPE_CHECKING:
    import torch

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86 names, then Arm's


def choose_device(device: str) -> str:
    """Turn the setting into a device name: `auto` takes CUDA, then MPS, then CPU.

    Raises:
        ConfigError: the named device is not on this machine, or is no device name.
    """
    import torch

    is_present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, present in is_present.items() if present)
    if is_present.get(device):
        return device
    seen = ", ".join(name for name, present in is_present.items() if present)
    raise ConfigError(
        f"device {device!r} was asked for; PyTorch {torch.__version__} sees {seen}",
        kept="nothing was loaded",
        fix="use `auto` or a device that is present, or install a PyTorch build for that device",
    )


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """Turn the setting into a torch dtype for a device that `choose_device` gave.

    `auto` is bfloat16 where the device computes in it (CUDA of compute capability 8 and up, MPS from
    macOS 14, CPUs with AVX512-BF16, AMX or Arm's BF16), else float32.

    Raises:
        ConfigError: the named dtype is unknown, or bfloat16 on a device that cannot hold it.
    """
    import torch

    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return torch.bfloat16 if _computes_in_bf16(device) else torch.float32
    if dtype not in named:
        raise ConfigError(f"dtype is {dtype!r}", kept="nothing was loaded", fix=f"use auto, {', '.join(named)}")
    if dtype == "bfloat16" and device != "cpu" and not _computes_in_bf16(device):
        raise ConfigError(
            f"device {device!r} of this machine does not compute in bfloat16",
            kept="nothing was loaded",
            fix="use dtype `auto`, `float32` or `float16`",
        )
    return named[dtype]


def _computes_in_bf16(device: str) -> bool:
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "mps":
        return int(platform.mac_ver()[0].split(".")[0] or 0) >= 14
    return bool(_cpu_flags() & _BF16_FLAGS)


def _cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction-set flags of the first CPU; empty where the system does not list them."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = (line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features")))
    return frozenset(next(flags, "").split())
