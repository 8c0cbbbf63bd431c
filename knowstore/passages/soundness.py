"""Whether stored rows are what was written, and what of their text can be told when they are not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from knowstore.errors import PassageError
from knowstore.passages.rows import PassageRow, checksum, date_checksum, to_arrow, to_stored
from knowstore.records import Passage


@dataclass(frozen=True)
class ExaminedRow:
    """A stored row: its id, what about it is not as it was written ("" when nothing is), where it is visible, and the
    passage that it holds: another than that of its id where rows were swapped or a text was damaged, None where it
    has no text that can be read. Its `checksum` is "" in tables without."""

    passage_id: str
    problem: str
    live_from: int
    live_to: int
    passage: Passage | None
    checksum: str


def examined_rows(batch: pa.RecordBatch, schema: pa.Schema) -> Iterator[ExaminedRow]:
    """Each row of a batch, read with all columns, compared with its id and its checksum.

    Args:
        batch: as `PassageTable.iter_rows` gives it.
        schema: the table's.
    """
    for raw in _as_dicts(batch):
        problem, passage = _examined(raw, schema)
        yield ExaminedRow(
            str(raw["id"]), problem, raw["live_from"], raw["live_to"], passage, str(raw.get("checksum") or "")
        )


def _as_dicts(batch: pa.RecordBatch) -> Iterator[Mapping[str, Any]]:
    """Rows as dictionaries; a text that is no longer UTF-8 has replaced characters."""
    try:
        yield from batch.to_pylist()
    except (UnicodeDecodeError, pa.ArrowException):
        for n in range(batch.num_rows):
            yield {name: _value(batch.column(name)[n]) for name in batch.schema.names}


def _value(scalar: Any) -> object:
    try:
        return scalar.as_py()
    except (UnicodeDecodeError, pa.ArrowException):
        return bytes(scalar.as_buffer()).decode("utf-8", "surrogateescape")


def _examined(raw: Mapping[str, Any], schema: pa.Schema) -> tuple[str, Passage | None]:
    """What is wrong with a row ("" when nothing is), and the passage that its text is of."""
    try:
        row = to_stored(raw)
        if row.passage.passage_id != row.id:
            return "its text is not what its id says", row.passage
        written = PassageRow(row.passage, row.vector, row.segments, row.segment_vectors)
        to_arrow([written], row.live_from, schema)
        is_written = "checksum" not in schema.names or raw["checksum"] == checksum(written)
    except (ValueError, TypeError, IndexError, PassageError, pa.ArrowException) as error:
        what = error.what if isinstance(error, PassageError) else str(error)
        return f"it cannot be read: {what}", _passage(raw)
    return ("" if is_written else "its vectors, spans or date are not what was written"), row.passage


def _passage(raw: Mapping[str, Any]) -> Passage | None:
    values = [raw.get(name) for name in ("text", "title", "source", "date")]
    if not all(isinstance(value, str) for value in values):
        return None
    return Passage(*map(str, values))


def mended_text(passage: Passage, passage_id: str) -> Passage | None:
    """The passage whose id is `passage_id` when `passage` differs from it in one bit of its text or title.

    The id is a digest of both, so trying every bit tells; None when more was damaged than one.
    """
    for field in ("text", "title"):
        for value in _flipped(getattr(passage, field)):
            tried = replace(passage, **{field: value})
            if tried.passage_id == passage_id:
                return tried
    return None


def mended_date(passage: Passage, checksums: Collection[str]) -> Passage:
    """The passage with the date that a checksum was taken of, when it is the one that it has or differs from it in
    one bit; with none otherwise, for a date that may be wrong is worse.

    Args:
        checksums: of the rows that may have been the passage's; none in a table that has no checksums.
    """
    expected = {checksum.partition("-")[0] for checksum in checksums}
    own = date_checksum(passage.passage_id, passage.date)
    if not expected or any(_differ_in_one(own, checksum) for checksum in expected):  # the checksum was damaged
        return passage
    for date in (passage.date, *_flipped(passage.date)):
        if date_checksum(passage.passage_id, date) in expected:
            return replace(passage, date=date)
    return replace(passage, date="")


def _differ_in_one(first: str, second: str) -> bool:
    return len(first) == len(second) and sum(one != other for one, other in zip(first, second, strict=True)) == 1


_MOST_BYTES = 8192  # of a text whose bits are tried: about half a second


def _flipped(text: str) -> Iterator[str]:
    """The text with each of its bits flipped in turn, where that is text."""
    data = text.encode("utf-8", "surrogateescape")
    for position in range(len(data) if len(data) <= _MOST_BYTES else 0):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            with suppress(UnicodeDecodeError):
                yield changed.decode()
