"""What the values in the catalog's rows must be: a file that was changed by hand may hold anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, get_args

from sqlalchemy import Connection, Text, cast, exists, null, select
from sqlalchemy.orm import InstrumentedAttribute

from knowstore.catalog.tables import (
    AuditAnswerRow,
    AuditRow,
    BatchRow,
    FingerprintRow,
    PlacementRow,
    ProbeRow,
)
from knowstore.records import BatchKind, Mode, ProbeKind

_Column = InstrumentedAttribute[Any]
_Check = Callable[[str], object]
_ROWS_AT_ONCE = 10_000
_SHOWN = 60  # characters of a bad value


def texts(value: object) -> tuple[str, ...]:
    """A list of texts from JSON; raises ValueError when it is none."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{value!r} is no list of texts")
    return tuple(value)


def mounted(value: object) -> tuple[tuple[str, float, int], ...]:
    """Experts as (passage_id, weight, batch_id) from JSON; raises ValueError when it is no list of such."""
    found: list[tuple[str, float, int]] = []
    for row in value if isinstance(value, list) else [value]:
        match row:
            case [str(passage_id), int() | float() as weight, int(batch_id)]:
                found.append((passage_id, weight, batch_id))
            case _:
                raise ValueError(f"{value!r} is no list of experts")
    return tuple(found)


def bad_values(connection: Connection) -> Iterator[str]:
    """What rows hold that cannot be read, or cannot be."""
    for name, (keys, checks) in _CHECKED.items():
        columns = (cast(column, Text) for column in checks)
        statement = select(*keys, *columns).order_by(*keys).execution_options(yield_per=_ROWS_AT_ONCE)
        for row in connection.execute(statement):
            for (column, check), value in zip(checks.items(), row[len(keys) :], strict=True):
                if value is not None and not _passes(check, value):
                    named = " in audit ".join(str(key) for key in row[: len(keys)])
                    yield f"{column.key} of {name} {named} is {value[:_SHOWN]!r}"
    yield from _bad_rows(connection)


def _bad_rows(connection: Connection) -> Iterator[str]:
    is_placed = exists().where((PlacementRow.added_batch == BatchRow.id) | (PlacementRow.removed_batch == BatchRow.id))
    for batch_id in connection.scalars(select(BatchRow.id).where(BatchRow.state == "live", ~is_placed)):
        yield f"edit batch {batch_id} is live, and nothing was added or removed with it"
    was_there = exists().where(PlacementRow.passage_id == ProbeRow.passage_id)
    asked = select(ProbeRow.id, ProbeRow.passage_id).where(ProbeRow.passage_id.is_not(None), ~was_there)
    for probe_id, passage_id in connection.execute(asked):
        yield f"probe {probe_id} asks for passage {passage_id}, which was never in the store"
    one = AuditAnswerRow
    is_whole = one.f1.is_not(None) & one.is_told.is_not(None) & one.experts.is_not(null())
    answered = select(one.probe_id, one.audit_id).where(one.em.is_not(None), ~is_whole)
    for probe_id, audit_id in connection.execute(answered):
        yield f"the answer to probe {probe_id} in audit {audit_id} lacks a part"


def _passes(check: _Check, value: str) -> bool:
    try:
        check(value)
    except ValueError:
        return False
    return True


def _one_of(names: tuple[str, ...]) -> _Check:
    def check(value: str) -> None:
        if value not in names:
            raise ValueError(value)

    return check


def _between(least: float, most: float) -> _Check:
    def check(value: str) -> None:
        if not least <= float(value) <= most:
            raise ValueError(value)

    return check


def _object(value: str) -> None:
    if not isinstance(json.loads(value), dict):
        raise ValueError(value)


_CHECKED: Mapping[str, tuple[tuple[_Column, ...], Mapping[_Column, _Check]]] = {
    "edit batch": (
        (BatchRow.id,),
        {
            BatchRow.kind: _one_of(get_args(BatchKind)),
            BatchRow.created_at: datetime.fromisoformat,
            BatchRow.committed_at: datetime.fromisoformat,
        },
    ),
    "fingerprint": ((FingerprintRow.id,), {FingerprintRow.created_at: datetime.fromisoformat}),
    "probe": (
        (ProbeRow.id,),
        {ProbeRow.kind: _one_of(get_args(ProbeKind)), ProbeRow.answers: lambda value: texts(json.loads(value))},
    ),
    "audit": (
        (AuditRow.id,),
        {
            AuditRow.mode: _one_of(get_args(Mode)),
            AuditRow.created_at: datetime.fromisoformat,
            AuditRow.finished_at: datetime.fromisoformat,
            AuditRow.seconds: _between(0, float("inf")),
            AuditRow.options: _object,
        },
    ),
    "the answer to probe": (
        (AuditAnswerRow.probe_id, AuditAnswerRow.audit_id),
        {
            AuditAnswerRow.em: _between(0, 1),
            AuditAnswerRow.f1: _between(0, 1),
            AuditAnswerRow.experts: lambda value: mounted(json.loads(value)),
        },
    ),
}
