"""Rows: CSV, TSV, JSON, JSON Lines and Parquet become one document per row."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import chain
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from knowstore.errors import ConfigError
from knowstore.records import SourceFailure
from knowstore.sources.dates import iso_date
from knowstore.sources.documents import Document
from knowstore.sources.finding import Source
from knowstore.sources.limits import check_json
from knowstore.sources.opening import decode, encoding_of, open_file, unreadable
from knowstore.sources.pages import leaf_columns, read_batches

_TEXT_NAMES = ("text", "passage", "content", "body", "contents", "abstract", "paragraph")
_TITLE_NAMES = ("title", "name", "headline", "heading", "subject")
_DATE_NAMES = ("date", "published", "created", "updated")
_MAX_LINE_CHARS = 16 * 1024 * 1024
_SPOOL_BYTES = 64 * 1024 * 1024
_UNDECODED = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of bytes
_MAP_COLUMNS = "say which column holds the text with a column map, such as text=body,title=headline"


@dataclass(frozen=True)
class ColumnMap:
    """Which columns hold what; None finds the usual names (`text`, `body`, `title`, `date`, ...)."""

    title: str | None = None
    text: str | None = None
    date: str | None = None

    @classmethod
    def parse(cls, mapping: str) -> ColumnMap:
        """Read `text=body,title=headline`.

        Raises:
            ConfigError: not of this form, an unknown field, or a field given twice.
        """
        known = [field.name for field in fields(cls)]
        chosen: dict[str, str] = {}
        for part in mapping.split(","):
            field, equals, column = (piece.strip() for piece in part.partition("="))
            if not equals or not column or field not in known or field in chosen:
                raise ConfigError(
                    f"column map {mapping!r} cannot be read at {part.strip()!r}",
                    kept="nothing was changed",
                    fix=f"write each of {', '.join(known)} at most once, such as text=body,title=headline",
                )
            chosen[field] = column
        return cls(**chosen)


Item = Document | SourceFailure


def read_csv(stream: io.BufferedReader, source: Source, columns: ColumnMap, delimiter: str | None) -> Iterator[Item]:
    """One document per row of a CSV or TSV file whose first row names the columns.

    Args:
        delimiter: None takes the one of comma, semicolon, tab and bar that the first row has most of. With a tab,
            quotes that make no sense as such are letters.

    Yields: documents, and a failure `name:line` for each row that cannot be read.

    Raises:
        SourceError: the first row cannot be read or names no text column.
    """
    problems: dict[int, str] = {}
    taken: list[str] = []
    lines = _csv_lines(stream, source, problems, taken)
    first_line = next(lines, "")
    csv.field_size_limit(_MAX_LINE_CHARS)  # the module has one limit for the whole process; its default is 128 KiB
    delimiter = delimiter or max(",;\t|", key=first_line.count)
    reader = csv.reader(chain([first_line], lines), delimiter=delimiter, strict=True)
    header = _csv_header(reader, source, columns, problems)
    while True:
        start = reader.line_num + 1
        taken.clear()
        rows: Iterable[list[str] | csv.Error]
        try:
            rows = [next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            rows = [error]
        found = {number: problems.pop(number) for number in range(start, reader.line_num + 1) if number in problems}
        if delimiter == "\t" and not found and not _fits(rows[0], header):
            rows = csv.reader(taken, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        for place, values in enumerate(rows, start):
            if found:
                yield _bad_row(source, f":{place}", next(iter(found.values())))
            elif isinstance(values, csv.Error):
                yield _bad_row(source, f":{place}", f"is not sound CSV up to line {reader.line_num}: {values}")
            elif any(value.strip() for value in values):
                if len(values) == len(header):
                    yield _item(source, f":{place}", dict(zip(header, values, strict=True)), columns)
                else:
                    yield _bad_row(source, f":{place}", f"has {len(values)} fields, the first row has {len(header)}")


def _fits(row: list[str] | csv.Error, header: Sequence[str]) -> bool:
    return isinstance(row, list) and len(row) == len(header)


def _csv_header(
    reader: Iterator[list[str]], source: Source, columns: ColumnMap, problems: Mapping[int, str]
) -> list[str]:
    try:
        header = [name.strip() for name in next(reader)]
    except csv.Error as error:
        raise unreadable(
            source, f"the first row is not sound CSV: {error}", "let the first row name the columns"
        ) from error
    if 1 in problems:
        raise unreadable(source, f"the first row {problems[1]}", "let the first row name the columns")
    if (reason := _missing_column(header, columns)) is not None:
        raise unreadable(source, reason, _MAP_COLUMNS)
    return header


def _csv_lines(stream: io.BufferedReader, source: Source, problems: dict[int, str], taken: list[str]) -> Iterator[str]:
    for number, line, problem in _lines(stream, source, newline=""):
        if problem:
            problems[number] = problem
        taken.append(line)
        yield line


def read_jsonl(stream: io.BufferedReader, source: Source, columns: ColumnMap) -> Iterator[Item]:
    """One document per line of a JSON Lines file.

    Yields: documents, and a failure `name:line` for each line that cannot be read.
    """
    for number, line, problem in _lines(stream, source, newline="\n"):
        place = f":{number}"
        if problem:
            yield _bad_row(source, place, problem)
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield _bad_row(source, place, f"is not JSON: {_json_reason(error)}")
            else:
                yield _item(source, place, row, columns)


def read_json(data: bytes, source: Source, columns: ColumnMap) -> Iterator[Item]:
    """The rows of a JSON file: a list of objects, an object with one list of them, or one object.

    Yields: documents, and a failure `name#row` (from 1) for each row that cannot be read.

    Raises:
        SourceError: not JSON, or neither of the three, or more than 10 million values.
    """
    try:
        text = decode(data, source)
        check_json(text, source)
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        fix = "mend it; one object per line is JSON Lines and wants the suffix .jsonl"
        raise unreadable(source, f"is not JSON: {_json_reason(error)}", fix) from error
    for number, row in enumerate(_rows_of_json(content, source, columns), start=1):
        yield _item(source, f"#{number}", row, columns)


def _rows_of_json(content: object, source: Source, columns: ColumnMap) -> list[object]:
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        fix = "give a list of objects, each with a text"
        raise unreadable(source, f"holds {_kind(content)}, not rows", fix)
    lists = [value for value in content.values() if isinstance(value, list)]
    if (reason := _missing_column(content, columns)) is None:
        return [content]
    if len(lists) != 1:
        raise unreadable(source, f"{reason}, and {len(lists)} lists where one could be its rows", _MAP_COLUMNS)
    return lists[0]


def read_parquet(stream: io.BufferedReader, source: Source, columns: ColumnMap) -> Iterator[Item]:
    """One document per row of a Parquet file, a batch of rows in memory at a time.

    Yields: documents, and a failure `name#row` (from 1) for each row that cannot be read.

    Raises:
        SourceError: not a Parquet file, damaged, without a text column, or with a page too large to be decompressed.
    """
    with ExitStack() as stack:
        spool = stack.enter_context(tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES))
        if source.path is None or (source.shown or source.path).suffix.lower() == ".gz":
            shutil.copyfileobj(stream, spool)
            spool.seek(0)
            file: BinaryIO = spool  # type: ignore[assignment]
        else:
            file = stack.enter_context(open_file(source))
        try:
            yield from _parquet_items(file, source, columns)
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise unreadable(source, f"is not a sound Parquet file: {reason}", "write or fetch it again") from error


def _parquet_items(file: BinaryIO, source: Source, columns: ColumnMap) -> Iterator[Item]:
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
        names = table.schema_arrow.names
        if (reason := _missing_column(names, columns)) is not None:
            raise unreadable(source, reason, _MAP_COLUMNS)
        wanted = [name for name in _pick(tuple(names), columns) if name is not None]
        leaves = leaf_columns(table, wanted, with_lists=False)
        if not leaf_columns(table, wanted[:1], with_lists=False):
            raise unreadable(source, f"has lists in {wanted[0]!r}, not texts", _MAP_COLUMNS)
        number = 0
        for batch in read_batches(table, file, leaves):
            for row in _rows_of_batch(batch):
                number += 1
                if row is None:
                    yield _bad_row(source, f"#{number}", "is not valid UTF-8")
                else:
                    yield _item(source, f"#{number}", row, columns)


def _rows_of_batch(batch: pa.RecordBatch) -> list[dict[str, object] | None]:
    """The rows of a batch; None for one whose text is not UTF-8, which Parquet does not check."""
    try:
        rows: list[dict[str, object] | None] = batch.to_pylist()
    except (ValueError, OverflowError):
        if batch.num_rows == 1:
            return [_row_by_value(batch)]
        rows = [row for n in range(batch.num_rows) for row in _rows_of_batch(batch.slice(n, 1))]
    return rows


def _row_by_value(batch: pa.RecordBatch) -> dict[str, object] | None:
    """The one row of a batch, where Python cannot hold every value: a date beyond its years, a time in a zone that it
    does not know. Such a one is null."""
    row: dict[str, object] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[0].as_py()
        except UnicodeDecodeError:
            return None
        except (ValueError, OverflowError):
            row[name] = None
    return row


def _lines(stream: io.BufferedReader, source: Source, newline: str) -> Iterator[tuple[int, str, str]]:
    """(line number from 1, line, what is wrong with it or "") of a text of any length."""
    encoding = encoding_of(stream.peek(1), source, is_head=True)
    errors = "replace" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
    text = io.TextIOWrapper(stream, encoding, errors=errors, newline=newline)
    number = 0
    while line := text.readline(_MAX_LINE_CHARS):
        number += 1
        problem = ""
        if len(line) == _MAX_LINE_CHARS and not line.endswith(("\n", "\r")):
            while (rest := text.readline(_MAX_LINE_CHARS)) and not rest.endswith(("\n", "\r")):
                pass
            line, problem = "\n", f"is longer than {_MAX_LINE_CHARS:,} characters"
        elif "\0" in line:
            problem = "holds a NUL byte"
        elif _UNDECODED.search(line):
            problem = f"is not valid {encoding.upper()}"
        yield number, line, problem


def _item(source: Source, place: str, row: object, columns: ColumnMap) -> Item:
    document = _document(row, columns)
    return _bad_row(source, place, document) if isinstance(document, str) else document


def _bad_row(source: Source, place: str, reason: str) -> SourceFailure:
    return SourceFailure(f"{source.name}{place}", f"the row {reason}")


def _document(row: object, columns: ColumnMap) -> Document | str:
    """The document of a row, or why there is none; a passage may be an object of its own in the row."""
    if not isinstance(row, Mapping):
        return f"is {_kind(row)}, not an object"
    if (reason := _missing_column(row, columns)) is not None:
        return reason
    text_name, title_name, date_name = _pick(tuple(row), columns)
    text, title, date = row[text_name], _short_text(row.get(title_name)), iso_date(row.get(date_name))
    if isinstance(text, Mapping):
        inner = _document(text, ColumnMap())
        return inner if isinstance(inner, str) else Document(inner.text, inner.title or title, inner.date or date)
    if not isinstance(text, str):
        return f"has {_kind(text)} in {text_name!r}, not a text"
    if not text.strip():
        return f"has an empty text in {text_name!r}"
    return Document(text, title, date)


def _missing_column(names: Iterable[str], columns: ColumnMap) -> str | None:
    """Why a row with these columns cannot be read, or None."""
    names = tuple(names)
    has = f"has {', '.join(map(repr, names[:20]))}" if names else "is empty"
    for wanted in (columns.text, columns.title, columns.date):
        if wanted is not None and wanted not in names:
            return f"has no column {wanted!r}; it {has}"
    if _pick(names, columns)[0] is None:
        return f"has no text column ({', '.join(_TEXT_NAMES)}); it {has}"
    return None


@lru_cache(maxsize=1024)
def _pick(names: tuple[str, ...], columns: ColumnMap) -> tuple[str | None, str | None, str | None]:
    """The names of the text, title and date columns."""
    by_folded = {name.strip().casefold(): name for name in reversed(names)}

    def first(chosen: str | None, usual: tuple[str, ...]) -> str | None:
        return chosen or next((by_folded[name] for name in usual if name in by_folded), None)

    return first(columns.text, _TEXT_NAMES), first(columns.title, _TITLE_NAMES), first(columns.date, _DATE_NAMES)


def _short_text(value: object) -> str:
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {
        bool: "a truth value", int: "a number", float: "a number", dict: "an object", list: "a list", bytes: "bytes",
    }  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")


def _json_reason(error: ValueError | RecursionError) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
