"""Conditions on passages as SQL strings, with every value quoted.

LanceDB also takes typed expressions, but its `update` prints them back to SQL without escaping
every quote; a string whose quotes are doubled means the same in each of its methods.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date

from knowstore.config import Filters
from knowstore.errors import FilterError
from knowstore.records import well_formed

_DATE = re.compile(r"(\d{4})(?:-(\d{2})(?:-(\d{2}))?)?")
_BATCHES = 2**31  # ids of edit batches are below
_AFTER = "~"  # sorts after every character of an ISO date, so that up to 2024-05 takes in 2024-05-31


@dataclass(frozen=True)
class PlacedFilters(Filters):
    """Filters by source for the rows of a table, each of which names one of its passage's sources: `shared` are the ids
    of those that come from the source that is asked for and from others."""

    shared: tuple[str, ...] = ()


def quote(value: str) -> str:
    """`value` as an SQL string literal, well-formed as texts that were ingested are."""
    return "'" + well_formed(value).replace("'", "''") + "'"


def is_in(column: str, values: Iterable[str]) -> str:
    """`column` equals one of `values`, of which there is at least one."""
    return f"{column} IN ({', '.join(map(quote, values))})"


def is_visible(at: int) -> str:
    """The row is live in the snapshot whose latest committed edit batch is `at`."""
    return f"live_from <= {int(at)} AND live_to > {int(at)}"


def where(at: int | None, filters: Filters | None = None) -> str | None:
    """The condition for a snapshot and filters; None when every row matches.

    Args:
        at: latest committed edit batch, or None for every stored row.
        filters: what must match as well.

    Raises:
        FilterError: a date that is not ISO 8601, a range that ends before it begins, or what is no edit batch's id.
    """
    conditions = [] if at is None else [is_visible(at)]
    if filters is not None:
        conditions += _conditions(filters)
    return " AND ".join(conditions) or None


def _conditions(filters: Filters) -> Iterable[str]:
    if filters.source is not None:
        is_named = _matches("source", filters.source)
        shared = filters.shared if isinstance(filters, PlacedFilters) else ()
        yield f"({is_named} OR {is_in('id', shared)})" if shared else is_named
    if filters.title is not None:
        yield _matches("title", filters.title)
    if filters.batch_id:
        if abs(filters.batch_id) >= _BATCHES:
            raise FilterError(
                f"there is no edit batch {filters.batch_id}",
                kept="nothing was searched",
                fix="run `knowstore batches` to see the ids there are",
            )
        yield f"live_from = {int(filters.batch_id)}"
    if filters.date_from and filters.date_to and filters.date_to + _AFTER < filters.date_from:
        raise FilterError(
            f"the filter's dates run from {filters.date_from} to {filters.date_to}",
            kept="nothing was searched",
            fix="give date_from at or before date_to",
        )
    if filters.date_from:
        yield f"date >= {quote(_checked_date('date_from', filters.date_from))}"
    if filters.date_to:
        yield f"date <> '' AND date <= {quote(_checked_date('date_to', filters.date_to) + _AFTER)}"


def _matches(column: str, pattern: str) -> str:
    if pattern.endswith("*"):
        return f"starts_with({column}, {quote(pattern[:-1])})"
    return f"{column} = {quote(pattern)}"


def _checked_date(name: str, value: str) -> str:
    match = _DATE.fullmatch(value)
    try:
        if match is None:
            raise ValueError("not of the form YYYY, YYYY-MM or YYYY-MM-DD")
        year, month, day = (int(part or 1) for part in match.groups())
        date(year, month, day)
    except ValueError as error:
        raise FilterError(
            f"{name} is {value!r}: {error}",
            kept="nothing was searched",
            fix="write the date as YYYY, YYYY-MM or YYYY-MM-DD",
        ) from error
    return value
