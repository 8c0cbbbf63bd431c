"""Parquet files read in bounded memory: the sizes of their pages are looked at before anything is decompressed.

A page of a few bytes can expand to gigabytes, and one long text in a dictionary can stand for any number of rows. Page
headers are Thrift structs in the compact protocol: https://github.com/apache/parquet-format#data-pages
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

_MAX_PAGE_BYTES = 256 * 1024 * 1024
_MAX_VALUES = 1 << 26  # of a page
_MAX_LIST_VALUES = 1 << 24  # of all lists of a column in a row group: one row may have them all
_BATCH_BYTES = 64 * 1024 * 1024
_BATCH_ROWS = 1024
_HEADER_BYTES, _MAX_HEADER_BYTES = 1 << 12, 1 << 24
_MAX_DEPTH = 16
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _STRUCT = (*range(9), 12)  # kinds of values
_SIZE, _COMPRESSED_SIZE = 2, 3  # fields of a page header
_DATA, _DICTIONARY, _DATA_V2 = 5, 7, 8  # its fields that are structs, whose first field is the number of values

Struct = dict[int, "int | Struct"]


@dataclass(frozen=True)
class _Pages:
    """The largest page of a column in a row group, and how many values all of its data pages have."""

    size_bytes: int
    n_values: int


def read_batches(
    table: pq.ParquetFile, file: BinaryIO, columns: Sequence[str], *, max_rows: int = _BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file, as many at a time as are sure to fit in 64 MiB, at most `max_rows`.

    Args:
        table: the file, opened.
        file: the same file, where its page headers are read.
        columns: paths of leaf columns, as `leaf_columns` gives them.

    Raises:
        ValueError: a page of more than 256 MiB or 67 million values, lists of more than 16 million in a row group, or
            headers that are none; nothing of that row group was decompressed.
    """
    wanted = set(columns)
    repeated = {path for path in wanted if _is_repeated(table, path)}
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        if not group.num_rows:  # some writers leave no pages there to be looked at
            continue
        largest = 1
        for index in range(group.num_columns):
            column = group.column(index)
            if column.path_in_schema in wanted:
                pages = _pages(file, column)
                if column.path_in_schema in repeated and pages.n_values > _MAX_LIST_VALUES:
                    raise ValueError(f"{column.path_in_schema} has {pages.n_values:,} values in {group.num_rows} rows")
                largest = max(largest, pages.size_bytes)
        n_rows = max(1, min(max_rows, _BATCH_BYTES // largest))  # a value is not larger than its page
        yield from table.iter_batches(n_rows, row_groups=[number], columns=list(columns))


def leaf_columns(table: pq.ParquetFile, names: Sequence[str], *, with_lists: bool) -> list[str]:
    """Paths of the leaf columns below top-level columns; those within lists only `with_lists`."""
    leaves = (table.schema.column(index) for index in range(len(table.schema)))
    return [
        leaf.path
        for leaf in leaves
        if (leaf.path in names or leaf.path.split(".")[0] in names) and (with_lists or not leaf.max_repetition_level)
    ]


def _is_repeated(table: pq.ParquetFile, path: str) -> bool:
    leaves = (table.schema.column(index) for index in range(len(table.schema)))
    return any(leaf.path == path and leaf.max_repetition_level > 0 for leaf in leaves)


def _pages(file: BinaryIO, column: pq.ColumnChunkMetaData) -> _Pages:
    """Walk the page headers of a column in a row group."""
    first = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < first:
        first = column.dictionary_page_offset
    at, end = first, first + column.total_compressed_size
    size_bytes = n_values = 0
    while at < end:
        header, length = _header(file, at, end)
        page_bytes, stored_bytes = header.get(_SIZE), header.get(_COMPRESSED_SIZE)
        if not isinstance(page_bytes, int) or not isinstance(stored_bytes, int) or min(page_bytes, stored_bytes) < 0:
            raise ValueError(f"{column.path_in_schema} has a page without a size at byte {at:,}")
        if page_bytes > _MAX_PAGE_BYTES:
            raise ValueError(
                f"{column.path_in_schema} has a page of {page_bytes:,} bytes at byte {at:,}, more than the limit of "
                f"{_MAX_PAGE_BYTES:,}"
            )
        for kind in (_DATA, _DICTIONARY, _DATA_V2):
            described = header.get(kind)
            n = described.get(1) if isinstance(described, dict) else 0
            if not isinstance(n, int) or not 0 <= n <= _MAX_VALUES:
                raise ValueError(f"{column.path_in_schema} has a page of {n} values at byte {at:,}")
            n_values += 0 if kind == _DICTIONARY else n
        size_bytes = max(size_bytes, page_bytes)
        at += length + stored_bytes
    return _Pages(size_bytes, n_values)


def _header(file: BinaryIO, at: int, end: int) -> tuple[Struct, int]:
    """The page header at a place of the file, and how many bytes it takes."""
    window = _HEADER_BYTES
    while True:
        file.seek(at)
        data = file.read(min(window, end - at))
        try:
            header, length = _struct(data, 0, 0)
        except IndexError:
            window *= 16
            if len(data) >= min(end - at, _MAX_HEADER_BYTES):
                raise ValueError(f"there is no page header at byte {at:,}") from None
        else:
            return header, length


# The compact protocol of Thrift, as far as a page header needs it


def _struct(data: bytes, at: int, depth: int) -> tuple[Struct, int]:
    """The integers and structs in a struct by field, and where it ends."""
    if depth > _MAX_DEPTH:
        raise ValueError("a page header is nested too deeply")
    fields: Struct = {}
    field = 0
    while (byte := data[at]) != _STOP:
        at, kind = at + 1, byte & 0x0F
        if byte >> 4:
            field += byte >> 4
        else:
            field, at = _integer(data, at)
        if kind in (_I16, _I32, _I64):
            fields[field], at = _integer(data, at)
        elif kind == _STRUCT:
            fields[field], at = _struct(data, at, depth + 1)
        else:
            at = _end(data, at, kind, depth)
    return fields, at + 1


def _end(data: bytes, at: int, kind: int, depth: int) -> int:
    """Where a value ends that is not wanted."""
    if kind in (_TRUE, _FALSE):
        return at
    if kind == _BYTE:
        return at + 1
    if kind in (_I16, _I32, _I64):
        return _integer(data, at)[1]
    if kind == _DOUBLE:
        return at + 8
    if kind == _BINARY:
        length, at = _varint(data, at)
        return at + length
    if kind == _STRUCT:
        return _struct(data, at, depth + 1)[1]
    raise ValueError(f"a page header holds a value of kind {kind}")  # no list, set or map is in one


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a page header holds a number that is too long")
