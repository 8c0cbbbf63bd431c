"""The examples run, on tiny random models."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from knowstore import ModelConfig

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_quickstart_runs_to_its_end(
    tmp_path: Path, tiny_models: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in ("bs4", "docx", "pypdf"):
        pytest.importorskip(library, reason="extra `docs` is not installed")
    runpy.run_path(str(EXAMPLES / "quickstart.py"))["main"](tmp_path / "store", tiny_models)
    printed = capsys.readouterr().out
    assert "62 passages in edit batch 1" in printed
    assert "edit batch 3 removed 1 passage" in printed
    assert "VerifyReport(clean=True" in printed
