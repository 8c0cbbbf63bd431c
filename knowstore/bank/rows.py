"""Rows of the expert bank as Arrow, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa

from knowstore.bank.expert import EncodedExpert

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("fingerprint", pa.string()),
        pa.field("codec", pa.string()),
        pa.field("form", pa.string()),
        pa.field("rank", pa.int32()),
        pa.field("segment_ranks", pa.list_(pa.int32())),
        pa.field("tensors", pa.large_binary(), metadata={"lance-encoding:compression": "none"}),
        pa.field("checksum", pa.string()),
        pa.field("batch", pa.int64()),
    ]
)


def to_arrow(experts: Collection[EncodedExpert]) -> pa.Table:
    """Encoded experts as a table of the bank."""
    return pa.table(
        {
            "id": [expert.passage_id for expert in experts],
            "fingerprint": [expert.fingerprint for expert in experts],
            "codec": [expert.codec for expert in experts],
            "form": [expert.form for expert in experts],
            "rank": [expert.rank for expert in experts],
            "segment_ranks": [list(expert.segment_ranks) for expert in experts],
            "tensors": [expert.data for expert in experts],
            "checksum": [expert.checksum for expert in experts],
            "batch": [expert.batch_id for expert in experts],
        },
        schema=SCHEMA,
    )


def from_arrow(row: Mapping[str, Any]) -> EncodedExpert:
    """A row read back with all its columns."""
    return EncodedExpert(
        passage_id=row["id"],
        fingerprint=row["fingerprint"],
        codec=row["codec"],
        form=row["form"],
        rank=row["rank"],
        segment_ranks=tuple(row["segment_ranks"]),
        data=row["tensors"],
        checksum=row["checksum"],
        batch_id=row["batch"],
    )
