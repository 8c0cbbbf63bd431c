"""Rows of the passages table and how they become Arrow and come back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from knowstore.errors import PassageError
from knowstore.records import Passage

LIVE = 2**62
"""`live_to` of a row that nothing has removed."""

_AS_WRITTEN = {"lance-encoding:compression": "none"}  # so that a search of the files' bytes finds what they hold

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class PassageRow:
    """A passage with its embeddings, to be added.

    Args:
        passage: the text; its `passage_id` is the row's id.
        vector: the passage's embedding, (E,).
        segments: character spans (start, end) of the passage's S segments.
        segment_vectors: the segments' embeddings, (S, E); kept as float16.
    """

    passage: Passage
    vector: Floats
    segments: Sequence[tuple[int, int]]
    segment_vectors: Floats


@dataclass(frozen=True, eq=False)
class StoredRow:
    """A row as it is stored: visible to a snapshot T when `live_from` <= T < `live_to`."""

    id: str
    passage: Passage
    vector: Floats
    segments: tuple[tuple[int, int], ...]
    segment_vectors: Floats
    live_from: int
    live_to: int


@dataclass(frozen=True, eq=False)
class Candidate:
    """A passage that a search proposes.

    `score` orders the result, higher first: the inner product of Eq. 7 for vector search, BM25 for
    text, the fused reciprocal ranks for hybrid. `vector_score` is the inner product in every case.
    `segment_vectors` is (S, E), one row for each of `segments`.
    """

    id: str
    title: str
    text: str
    source: str
    date: str
    live_from: int
    score: float
    vector_score: float
    segments: tuple[tuple[int, int], ...]
    segment_vectors: Floats


def make_schema(dim: int) -> pa.Schema:
    """Columns of the passages table for embeddings of width `dim`."""
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            *(pa.field(name, pa.string(), metadata=_AS_WRITTEN) for name in ("text", "title", "source")),
            pa.field("date", pa.string()),
            pa.field("vector", pa.list_(pa.float32(), dim)),
            pa.field("segments", pa.list_(pa.int32())),
            pa.field("segment_vectors", pa.large_binary(), metadata=_AS_WRITTEN),
            pa.field("live_from", pa.int64()),
            pa.field("live_to", pa.int64()),
            pa.field("checksum", pa.string()),
        ]
    )


def to_arrow(rows: Sequence[PassageRow], batch_id: int, schema: pa.Schema) -> pa.Table:
    """New rows of an edit batch as an Arrow table.

    Raises:
        PassageError: embeddings that are not finite or not of the table's width, or spans that do not fit.
    """
    dim: int = schema.field("vector").type.list_size
    for row in rows:
        _check(row, dim)
    vectors = np.concatenate([np.asarray(row.vector, np.float32) for row in rows])
    columns = {
        "id": [row.passage.passage_id for row in rows],
        "text": [row.passage.text for row in rows],
        "title": [row.passage.title for row in rows],
        "source": [row.passage.source for row in rows],
        "date": [row.passage.date for row in rows],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors), dim),
        "segments": [[end for span in row.segments for end in span] for row in rows],
        "segment_vectors": [np.asarray(row.segment_vectors, np.float16).tobytes() for row in rows],
        "live_from": [batch_id] * len(rows),
        "live_to": [LIVE] * len(rows),
        "checksum": list(map(checksum, rows)),
    }
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def checksum(row: PassageRow) -> str:
    """What never changes in a row and is not in its id: BLAKE2b of its date, 8 bytes in hex, and behind a `-` of its
    vectors and spans, 16 bytes. Tables of earlier versions have no column for it."""
    passage_id, date = row.passage.passage_id, row.passage.date
    numbers = hashlib.blake2b(
        json.dumps([passage_id, [end for span in row.segments for end in span]]).encode(), digest_size=16
    )
    numbers.update(np.asarray(row.vector, np.float32).tobytes())
    numbers.update(np.asarray(row.segment_vectors, np.float16).tobytes())
    return f"{date_checksum(passage_id, date)}-{numbers.hexdigest()}"


def date_checksum(passage_id: str, date: str) -> str:
    """The first part of a row's checksum."""
    return hashlib.blake2b(f"{passage_id} {date}".encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _check(row: PassageRow, dim: int) -> None:
    n_segments = len(row.segments)
    problem = None
    if row.vector.shape != (dim,) or not np.isfinite(row.vector).all():
        problem = f"its vector is {row.vector.shape}, expected finite numbers of shape ({dim},)"
    elif row.segment_vectors.shape != (n_segments, dim):
        problem = f"its segment_vectors are {row.segment_vectors.shape}, expected ({n_segments}, {dim})"
    elif not (np.abs(row.segment_vectors) <= np.finfo(np.float16).max).all():
        problem = "its segment_vectors hold a number that float16 cannot"
    elif not all(0 <= start <= end <= len(row.passage.text) for start, end in row.segments):
        problem = f"its segments reach outside the text of {len(row.passage.text)} characters"
    if problem:
        raise PassageError(
            f"passage {row.passage.passage_id} cannot be stored: {problem}",
            kept="no passage of this call was written",
            fix="embed it with the retriever that this table was made for",
        )


def _spans(flat: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _segment_vectors(row: Mapping[str, Any]) -> Floats:
    halves = np.frombuffer(row["segment_vectors"], np.float16)
    return halves.reshape(-1, len(row["vector"])).astype(np.float32)  # (S, E)


def to_stored(row: Mapping[str, Any]) -> StoredRow:
    """A row read back with all its columns."""
    return StoredRow(
        id=row["id"],
        passage=Passage(text=row["text"], title=row["title"], source=row["source"], date=row["date"]),
        vector=np.asarray(row["vector"], np.float32),
        segments=_spans(row["segments"]),
        segment_vectors=_segment_vectors(row),
        live_from=row["live_from"],
        live_to=row["live_to"],
    )


def to_candidate(row: Mapping[str, Any], score: float, vector_score: float) -> Candidate:
    """A row read back by a search, with its scores."""
    return Candidate(
        id=row["id"],
        title=row["title"],
        text=row["text"],
        source=row["source"],
        date=row["date"],
        live_from=row["live_from"],
        score=score,
        vector_score=vector_score,
        segments=_spans(row["segments"]),
        segment_vectors=_segment_vectors(row),
    )
