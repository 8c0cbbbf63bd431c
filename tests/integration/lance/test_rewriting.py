"""A table that is written on a disk that fails without a word."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lancedb
import pytest

from knowstore.lance import read_back, write_without

Tear = Callable[[lancedb.table.Table], None]


@pytest.fixture
def tear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tear:
    """Has every file of rows that a table adds from now on be torn."""

    def begin(table: lancedb.table.Table) -> None:
        add = table.add

        def torn(*arguments: Any, **options: Any) -> None:
            before = set(tmp_path.rglob("data/*.lance"))
            add(*arguments, **options)
            for written in set(tmp_path.rglob("data/*.lance")) - before:
                os.truncate(written, written.stat().st_size // 2)

        monkeypatch.setattr(table, "add", torn)

    return begin


def test_rows_that_cannot_be_read_when_they_were_written_anew_leave_the_table_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tear: Tear
) -> None:
    table = lancedb.connect(tmp_path).create_table("notes", [{"id": name, "text": name * 5_000} for name in "abc"])
    tear(table)
    with pytest.raises(OSError, match="what was written cannot be read"):
        write_without(table, ["a"], 2)
    assert table.search().to_arrow()["id"].to_pylist() == ["a", "b", "c"]
    monkeypatch.undo()
    write_without(table, ["a"], 2)
    assert table.search().to_arrow()["id"].to_pylist() == ["b", "c"]


def test_rows_that_cannot_be_read_when_they_were_added_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tear: Tear
) -> None:
    table = lancedb.connect(tmp_path).create_table("notes", [{"id": name, "text": name * 5_000} for name in "abc"])
    tear(table)
    with pytest.raises(OSError, match="what was written cannot be read"), read_back(table, ["id = 'd'"]):
        table.add([{"id": "d", "text": "d" * 5_000}])
    assert table.search().to_arrow()["id"].to_pylist() == ["a", "b", "c"]
    monkeypatch.undo()
    with read_back(table, ["id = 'd'"]):
        table.add([{"id": "d", "text": "d" * 5_000}])
    assert table.search().to_arrow()["id"].to_pylist() == ["a", "b", "c", "d"]
