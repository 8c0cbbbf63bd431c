from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from knowstore.sources import ColumnMap
from knowstore.sources.opening import open_source

GOOD = b'{"text": "good"}\n'


def parquet_bytes(**columns: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def zip_bytes(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


REFUSED = {
    "empty.txt": (b"", "the file is empty"),
    "empty.csv": (b"", "the file is empty"),
    "empty.txt.gz": (gzip.compress(b""), "the compressed file is empty"),
    "no-bytes.txt.gz": (b"", "the file is empty"),
    "blanks.txt": (b" \n\t\n ", "has no text"),
    "blanks.jsonl": (b"\n\n \n", "has no text"),
    "only-mark.csv": (b"\xef\xbb\xbf", "has no text column"),
    "only-header.csv": (b"text,title\n", "has no text"),
    "empty-list.json": (b"[]", "has no text"),
    "binary.txt": (bytes(range(256)) * 20, "is binary, not text: NUL byte at byte 0"),
    "binary.jsonl": (bytes(range(256)) * 20, "is binary"),
    "nul.txt": (b"some text\0 more", "NUL byte at byte 9"),
    "controls.md": (b"\x01\x02\x03\x04 abc" * 20, "is binary, not text: 80 control bytes"),
    "no-mark.txt": ("wide".encode("utf-16-le"), "is binary"),
    "picture.html": (b"\x89PNG\r\n\x1a\n\0\0", "is binary"),
    "broken.txt": ("Zoë naïve café é".encode() + b"\xff tail", "UTF-8 with broken bytes, the first at byte 20"),
    "charset.html": (b"<meta charset=none-such><p>caf\xe9", "is not valid NONE-SUCH"),
    "declared.html": (b"<meta charset=utf-8><p>caf\xe9", "is not valid UTF-8"),
    "broken.txt.gz": (half(gzip.compress(os.urandom(2000))), "is not sound gzip data"),
    "plain.txt.gz": (b"not compressed", "is not sound gzip data"),
    "flipped.jsonl.gz": (gzip.compress(GOOD)[:-6] + b"abcdef", "is not sound gzip data"),
    "binary.csv.gz": (gzip.compress(bytes(range(256)) * 20), "is binary"),
    "bomb.txt.gz": (gzip.compress(b"a" * 3_000_000), "holds more than 1,000,000 bytes uncompressed"),
    "bomb.jsonl.gz": (gzip.compress(b'{"text": "' + b"a" * 3_000_000), "holds more than 1,000,000 bytes uncompressed"),
    "bomb.parquet.gz": (gzip.compress(b"PAR1" + b"a" * 3_000_000), "holds more than 1,000,000 bytes uncompressed"),
    "bomb.docx": (zip_bytes(a=b"a" * 3_000_000), "uncompressed, more than the limit"),
    "large.txt": (b"a" * 1_000_001, "has 1,000,001 bytes, more than the limit of 1,000,000"),
    "broken.json": (b'[{"text": "a"}, ', "is not JSON"),
    "scalar.json": (b"42", "holds a number, not rows"),
    "null.json": (b"null", "holds null, not rows"),
    "no-rows.json": (b'{"a": [1], "b": [2]}', "2 lists where one could be its rows"),
    "bare.json": (b'{"a": 1}', "has no text column"),
    "deep.json": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "bad-rows.json": (b"[1, 2]", "gives no passage; 2 bad rows"),
    "digits.json": (b"9" * 5_000, "is not JSON"),
    "lines.jsonl": (b"not json\n" * 500, "given up after 100 bad rows"),
    "no-text.csv": (b"a,b\n1,2\n", "has no text column (text, passage, content"),
    "no-text.tsv": (b"a\tb\n1\t2\n", "it has 'a', 'b'"),
    "quote.csv": (b'"text"x,b\n1,2\n', "the first row is not sound CSV"),
    "noise.pdf": (b"%PDF-1.7 and then nothing", "is not a sound PDF file"),
    "text.pdf": (b"just text", "is not a sound PDF file"),
    "noise.docx": (b"just text", "is not a sound Word file"),
    "renamed.docx": (zip_bytes(a=b"text"), "is not a sound Word file"),
    "noise.parquet": (b"PAR1 and then nothing", "is not a sound Parquet file"),
    "half.parquet": (half(parquet_bytes(text=["a"] * 100)), "is not a sound Parquet file"),
    "no-text.parquet": (parquet_bytes(a=["x"], b=[1]), "has no text column"),
    "numbers.parquet": (parquet_bytes(text=[1, 2]), "gives no passage; 2 bad rows"),
    "no-text.html": (b"<html><head><title>T</title></head><script>x</script></html>", "has no text"),
    "no-text.md": (b"---\ntitle: T\n---\n", "has no text"),
    "unknown.xyz": (b"text", "the suffix '.xyz' is not known"),
    "README": (b"text", "has no suffix"),
    "archive.gz": (gzip.compress(b"text"), "has no suffix"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_source_that_cannot_be_read_is_refused_with_its_name_and_the_reason(
    tmp_path: Path, read: Callable, name: str
) -> None:
    data, reason = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    reading = read(tmp_path / name, max_bytes=1_000_000)
    assert reading.passages == []
    assert reading.error is not None
    assert (tmp_path / name).as_posix() in reading.error.what
    assert reason in reading.error.what
    assert reading.error.kept
    assert reading.error.fix


ROWS_REPORTED = {
    "list.jsonl": (GOOD + b"[1]\n" + GOOD, ":2", "is a list, not an object"),
    "broken.jsonl": (GOOD + b'{"text": \n' + GOOD, ":2", "is not JSON"),
    "deep.jsonl": (GOOD + b"[" * 100_000 + b"\n" + GOOD, ":2", "nested too deeply"),
    "no-text.jsonl": (GOOD + b'{"words": "a"}\n' + GOOD, ":2", "has no text column"),
    "no-keys.jsonl": (GOOD + b"{}\n" + GOOD, ":2", "it is empty"),
    "number.jsonl": (GOOD + b'{"text": 5}\n' + GOOD, ":2", "has a number in 'text', not a text"),
    "null.jsonl": (GOOD + b'{"text": null}\n' + GOOD, ":2", "has null in 'text'"),
    "blank.jsonl": (GOOD + b'{"text": " "}\n' + GOOD, ":2", "has an empty text"),
    "nested.jsonl": (GOOD + b'{"passage": {"title": "a"}}\n' + GOOD, ":2", "has no text column"),
    "nul.jsonl": (GOOD + b'{"text": "a\0b"}\n' + GOOD, ":2", "holds a NUL byte"),
    "utf8.jsonl": (GOOD + '{"text": "éé'.encode() + b'\xff"}\n' + GOOD, ":2", "is not valid UTF-8"),
    "rows.json": (b'[{"text": "good"}, 7, {"text": "good"}]', "#2", "is a number, not an object"),
    "long.csv": (b"text,b\ngood,1\nmore,2,3\ngood,1\n", ":3", "has 3 fields, the first row has 2"),
    "short.csv": (b"text,b\ngood,1\nless\n\ngood,1\n", ":3", "has 1 fields, the first row has 2"),
    "quotes.csv": (b'text,b\ngood,1\n"a"b,2\ngood,1\n', ":3", "is not sound CSV"),
    "nul.csv": (b"text,b\ngood,1\na\0b,2\ngood,1\n", ":3", "holds a NUL byte"),
    "utf8.csv": ("text,b\ngood,1\nééé".encode() + b"\xff,2\ngood,1\n", ":3", "is not valid UTF-8"),
    "rows.tsv": (b"text\tb\ngood\t1\n\t2\ngood\t1\n", ":3", "has an empty text"),
    "utf8.parquet": (
        parquet_bytes(text=pa.array([b"good", b"\xff", b"good"]).view(pa.string())),
        "#2",
        "not valid UTF-8",
    ),
    "rows.parquet": (parquet_bytes(text=["good", None, "good"]), "#2", "has null in 'text'"),
}


@pytest.mark.parametrize("name", ROWS_REPORTED)
def test_a_bad_row_is_reported_with_its_place_and_the_rest_is_read(tmp_path: Path, read: Callable, name: str) -> None:
    data, place, reason = ROWS_REPORTED[name]
    (tmp_path / name).write_bytes(data)
    reading = read(tmp_path / name)
    assert reading.texts == ["good", "good"]
    assert reading.error is None
    [failure] = reading.failures
    assert failure.source == f"{(tmp_path / name).as_posix()}{place}"
    assert reason in failure.error


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_an_enormous_line_is_reported_and_the_rest_is_read(
    tmp_path: Path, read: Callable, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knowstore.sources.rows._MAX_LINE_CHARS", 100)
    limit = csv.field_size_limit()
    lines = {"a.csv": ["text,b", "good,1", "x" * 250 + ",1", "good,1"], "a.jsonl": ["{}", *[GOOD.decode().strip()] * 2]}
    lines["a.jsonl"].insert(1, json.dumps({"text": "x" * 250}))
    (tmp_path / name).write_text("\n".join(lines[name]))
    reading = read(tmp_path / name)
    csv.field_size_limit(limit)
    assert reading.texts == ["good", "good"]
    assert "is longer than 100 characters" in reading.failures[-1].error


def test_an_enormous_quoted_field_is_reported_and_the_rest_is_read(
    tmp_path: Path, read: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knowstore.sources.rows._MAX_LINE_CHARS", 100)
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text('text,b\ngood,1\n"' + "never closed\n" * 8 + "good,1\n")
    reading = read(tmp_path / "a.csv")
    csv.field_size_limit(limit)
    assert reading.texts == ["good", "good"]
    assert "field larger than field limit" in reading.failures[0].error


def test_a_field_of_a_megabyte_is_read(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.csv").write_text("text,b\n" + "word " * 200_000 + ",1\n")
    assert len(read(tmp_path / "a.csv").passages) == 2_000


def test_an_unclosed_quote_at_the_end_is_reported_with_the_lines_it_took(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.csv").write_text('text,b\ngood,1\n"open,2\nlost,3\n')
    reading = read(tmp_path / "a.csv")
    assert reading.texts == ["good"]
    assert reading.failures[0].source.endswith(":3")
    assert "up to line 4: unexpected end of data" in reading.failures[0].error


@pytest.mark.parametrize(
    "dates",
    [
        pa.array([2**60, 0], pa.timestamp("us")),
        pa.array([2**30, 0], pa.date32()),
        pa.array([0, 0], pa.timestamp("us", tz="Mars/Phobos")),
    ],
    ids=["a time too late", "a day too late", "an unknown zone"],
)
def test_a_date_that_cannot_be_told_is_none_and_its_row_is_read(
    dates: pa.Array, tmp_path: Path, read: Callable
) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(text=["first", "second"], date=dates))
    reading = read(tmp_path / "a.parquet")
    assert reading.texts == ["first", "second"]
    assert reading.passages[0].date == ""
    assert (reading.failures, reading.error) == ([], None)


def test_a_table_without_rows_is_said_to_have_no_text(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(text=pa.array([], pa.string())))
    assert "has no text" in read(tmp_path / "a.parquet").error.what


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_wrong_column_map_is_named(tmp_path: Path, read: Callable, name: str) -> None:
    data = {
        "a.csv": b"text,b\na,1\n",
        "a.jsonl": b'{"text": "a", "b": 1}',
        "a.parquet": parquet_bytes(text=["a"], b=[1]),
    }
    (tmp_path / name).write_bytes(data[name])
    reading = read(tmp_path / name, columns=ColumnMap(text="body"))
    assert reading.error is not None
    told = [reading.error.what, *(failure.error for failure in reading.failures)]
    assert any("has no column 'body'; it has 'text', 'b'" in text for text in told)


def test_rows_before_the_damage_of_a_compressed_file_are_read(tmp_path: Path, read: Callable) -> None:
    rows = b"".join(json.dumps({"text": os.urandom(500).hex()}).encode() + b"\n" for _ in range(3_000))
    data = gzip.compress(rows)
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) - 1_000])
    reading = read(tmp_path / "a.jsonl.gz")
    assert len(reading.passages) > 0
    assert reading.error is not None
    assert "is not sound gzip data" in reading.error.what


def test_a_line_without_a_sentence_end_is_cut_between_words(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.txt").write_text("word " * 100_000)
    assert {len(text.split()) for text in read(tmp_path / "a.txt").texts} == {100}


def test_an_encrypted_pdf_is_refused(tmp_path: Path, read: Callable, make_pdf: Callable) -> None:
    (tmp_path / "a.pdf").write_bytes(make_pdf(["Hidden."], password="secret"))
    assert "the PDF is encrypted" in read(tmp_path / "a.pdf").error.what


def test_a_pdf_without_text_is_refused(tmp_path: Path, read: Callable, make_pdf: Callable) -> None:
    (tmp_path / "a.pdf").write_bytes(make_pdf([]))
    error = read(tmp_path / "a.pdf").error
    assert "has no text in its 1 pages" in error.what
    assert "OCR" in error.fix


def test_a_bad_page_of_a_pdf_is_reported_and_the_rest_is_read(
    tmp_path: Path, read: Callable, make_pdf: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter()
    for text in ("Bad.", "Good."):
        writer.append(io.BytesIO(make_pdf([text])))
    writer.write(tmp_path / "a.pdf")
    extract = pypdf.PageObject.extract_text

    def fail_on_first(page: object) -> str:
        if page.page_number == 0:
            raise KeyError("/Font")
        return extract(page)

    monkeypatch.setattr(pypdf.PageObject, "extract_text", fail_on_first)
    reading = read(tmp_path / "a.pdf")
    assert reading.texts == ["Good."]
    assert [failure.source for failure in reading.failures] == [f"{(tmp_path / 'a.pdf').as_posix()}#page1"]


@pytest.mark.parametrize(("name", "module"), [("a.pdf", "pypdf"), ("a.docx", "docx"), ("a.html", "bs4")])
def test_a_missing_extra_is_named(
    tmp_path: Path, read: Callable, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    assert "pip install 'knowstore[docs]'" in read(tmp_path / name).error.fix


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path, read: Callable) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "device.txt").symlink_to("/dev/null")
    assert "is a pipe (fifo), not a regular file" in read(tmp_path / "pipe.txt").error.what
    assert "is a folder, not a regular file" in read(tmp_path / "folder.txt").error.what
    assert "is a device, not a regular file" in read(tmp_path / "device.txt").error.what


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [("a.txt", b"The Elbe.", None), ("a.parquet", parquet_bytes(text=["The Elbe."]), "does not exist")],
)
def test_a_file_that_is_deleted_while_it_is_read_costs_itself_at_most(
    name: str, data: bytes, error: str | None, tmp_path: Path, read: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def deleted_then(*arguments: Any) -> Iterator[tuple[str, io.BufferedReader]]:
        with open_source(*arguments) as opened:
            (tmp_path / name).unlink()
            yield opened

    (tmp_path / name).write_bytes(data)
    monkeypatch.setattr("knowstore.sources.reading.open_source", deleted_then)
    reading = read(tmp_path / name)
    if error is None:
        assert (reading.texts, reading.error) == (["The Elbe."], None)
    else:
        assert error in reading.error.what


def test_a_missing_file_is_refused(tmp_path: Path, read: Callable) -> None:
    assert "does not exist" in read(tmp_path / "gone.txt").error.what


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "permission denied"),
        (OSError(5, "Input/output error"), "Input/output"),
    ],
)
def test_a_file_that_the_system_refuses_to_open_is_named(
    tmp_path: Path, read: Callable, monkeypatch: pytest.MonkeyPatch, error: OSError, reason: str
) -> None:
    def refuse(*_: object) -> None:
        raise error

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(Path, "open", refuse)
    assert reason in read(tmp_path / "a.txt").error.what


def test_a_disk_that_fails_while_reading_is_named(read: Callable) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    assert "cannot be read: Input/output error" in read(None, stdin=Failing()).error.what


def test_stdin_that_is_missing_or_too_large_is_refused(read: Callable) -> None:
    assert "no standard input" in read(None).error.what
    assert "has more than 10 bytes" in read(None, stdin=io.BytesIO(b"a" * 20), max_bytes=10).error.what
