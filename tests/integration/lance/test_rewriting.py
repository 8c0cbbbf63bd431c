"""A table that is written anew on a disk that fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lancedb
import pytest

from knowstore.lance import write_without


def test_rows_that_cannot_be_read_when_they_were_written_leave_the_table_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = lancedb.connect(tmp_path).create_table("notes", [{"id": name, "text": name * 5_000} for name in "abc"])
    add = table.add

    def torn(*arguments: Any, **options: Any) -> None:
        before = set(tmp_path.rglob("*.lance"))
        add(*arguments, **options)
        for written in set(tmp_path.rglob("data/*.lance")) - before:
            os.truncate(written, written.stat().st_size // 2)

    monkeypatch.setattr(table, "add", torn)
    with pytest.raises(OSError, match="what was written cannot be read"):
        write_without(table, ["a"], 2)
    assert table.search().to_arrow()["id"].to_pylist() == ["a", "b", "c"]
    monkeypatch.undo()
    write_without(table, ["a"], 2)
    assert table.search().to_arrow()["id"].to_pylist() == ["b", "c"]
