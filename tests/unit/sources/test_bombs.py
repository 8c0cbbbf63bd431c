"""Small files that would grow to gigabytes, read in a process whose memory is measured."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from knowstore.sources import leaf_columns, read_batches
from tests.resources.bombs import BOMBS, parquet

SAID = {
    "one-text.parquet": "300 passages",
    "page.parquet": "text has a page of 270,000,010 bytes at byte 4, more than the limit of 268,435,456",
    "lists.parquet": "has lists in 'text', not texts",
    "values.json": "has 20,000,004 values, more than the limit of 10,000,000",
    "objects.json.gz": "has 12,000,002 values, more than the limit",
    "tags.html": "has 2,000,001 tags, more than the limit of 2,000,000",
    "marks.md": "has 2,000,002 line ends and marks, more than the limit",
    "tags.docx": "has more than 4,000,000 tags",
    "spans.docx": "1 passages",
    "entities.docx": "is not a sound Word file",
    "drawing.pdf": "its drawing has 16,000,000 bytes, more than the limit of 8,388,608",
    "line.jsonl.gz": "is longer than 16,777,216 characters",
    "probes.jsonl.gz": "more than 16,777,216 bytes up to line 1",
    "junk-probes.jsonl.gz": "given up after 10,000 rows that are no probes",
}


def test_bombs_are_refused_or_read_in_little_memory() -> None:
    for library in ("docx", "pypdf", "bs4"):
        pytest.importorskip(library)
    done = subprocess.run(
        [sys.executable, "-m", "tests.resources.bombs"], cwd=Path(__file__).parents[3], capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    rows = {row["bomb"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert set(rows) == set(BOMBS) == set(SAID), done.stderr
    for name, row in rows.items():
        assert SAID[name] in row["said"]
        assert row["grown_mb"] < 300, row


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["NONE", "zstd"])
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_sound_parquet_files_are_read_whole_whatever_their_pages_look_like(
    version: str, codec: str, use_dictionary: bool, tmp_path: Path
) -> None:
    rows = {
        "text": [f"row {n % 700} " * (n % 50) for n in range(3_000)],
        "inner": [{"title": f"t{n}", "tags": ["a"] * (n % 3)} for n in range(3_000)],
        "many": [[n, None] for n in range(3_000)],
    }
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table(rows), path, compression=codec, use_dictionary=use_dictionary, data_page_version=version,
        data_page_size=2_000, row_group_size=1_100, write_page_checksum=True,
    )  # fmt: skip
    with path.open("rb") as file, pq.ParquetFile(file) as table:
        every = leaf_columns(table, list(rows), with_lists=True)
        assert leaf_columns(table, ["text", "inner"], with_lists=False) == ["text", "inner.title"]
        batches = list(read_batches(table, file, every, max_rows=500))
        assert [row for batch in batches for row in batch.to_pylist()] == pq.read_table(path).to_pylist()
        assert max(batch.num_rows for batch in batches) <= 500


@pytest.mark.parametrize(("at", "value"), [(4, 0xFF), (5, 0x80), (6, 0xFF), (4, 0x0C)])
def test_a_page_header_that_is_none_is_refused_before_anything_is_decompressed(at: int, value: int) -> None:
    data = bytearray(parquet(pa.array(["some text"] * 10), use_dictionary=False))
    data[at] = value
    with pq.ParquetFile(io.BytesIO(data)) as table, pytest.raises(ValueError, match="page"):
        next(read_batches(table, io.BytesIO(data), ["text"]))
