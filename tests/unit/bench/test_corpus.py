"""What benches call the files that they are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from knowstore.bench.corpus import names_of


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a/nq.jsonl", "b/squad.jsonl"], ["nq.jsonl", "squad.jsonl"]),
        (["x/a/nq.jsonl", "x/b/nq.jsonl"], ["a/nq.jsonl", "b/nq.jsonl"]),
        (["a/x/nq.jsonl", "b/x/nq.jsonl", "b/x/squad.jsonl"], ["a/x/nq.jsonl", "b/x/nq.jsonl", "b/x/squad.jsonl"]),
        (["a/nq.jsonl", "a/nq.jsonl"], ["nq.jsonl", "nq.jsonl"]),
    ],
)
def test_files_are_called_by_what_tells_them_apart(files: list[str], names: list[str]) -> None:
    assert names_of([Path(file) for file in files]) == names
