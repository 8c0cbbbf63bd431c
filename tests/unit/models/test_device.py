from __future__ import annotations

from pathlib import Path

import pytest
import torch

from knowstore.errors import ConfigError
from knowstore.models import choose_device, choose_dtype, device


@pytest.fixture
def only_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("only_cpu")
def test_auto_takes_the_cpu_where_nothing_else_is() -> None:
    assert choose_device("auto") == "cpu"


def test_auto_prefers_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"


@pytest.mark.usefixtures("only_cpu")
@pytest.mark.parametrize("name", ["cuda", "mps", "toaster"])
def test_absent_device_is_an_error_and_never_the_cpu(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*sees cpu"):
        choose_device(name)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx512_bf16 sse", torch.bfloat16), ("fpu amx_bf16", torch.bfloat16), ("fpu avx2", torch.float32)],
)
def test_auto_dtype_is_bfloat16_where_the_cpu_computes_in_it(
    flags: str, expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    found = device._cpu_flags(tmp_path / "cpuinfo")
    monkeypatch.setattr(device, "_cpu_flags", lambda: found)
    assert choose_dtype("auto", "cpu") == expected


def test_auto_dtype_is_float32_where_cpu_flags_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = device._cpu_flags(tmp_path / "nothing")
    monkeypatch.setattr(device, "_cpu_flags", lambda: found)
    assert choose_dtype("auto", "cpu") == torch.float32


def test_named_dtype_is_kept_on_a_cpu() -> None:
    assert [choose_dtype(name, "cpu") for name in ("float32", "bfloat16", "float16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]


def test_unknown_dtype_is_an_error() -> None:
    with pytest.raises(ConfigError, match="float8"):
        choose_dtype("float8", "cpu")


def test_bfloat16_on_a_gpu_without_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_dtype("auto", "cuda") == torch.float32
    with pytest.raises(ConfigError, match="does not compute in bfloat16"):
        choose_dtype("bfloat16", "cuda")
