"""Dates as people and files write them become ISO 8601."""

from __future__ import annotations

import re
from datetime import date, datetime

_YEAR_FIRST = re.compile(r"(\d{4})(?:[-/.](\d{1,2})(?:[-/.](\d{1,2}))?)?")
_WRITTEN_FORMS = ("%d %B %Y", "%d %b %Y", "%B %d %Y", "%b %d %Y", "%a %d %b %Y", "%A %d %B %Y", "%A %B %d %Y")
_MAX_CHARS = 64
_TIME = re.compile(r"\s+\d{1,2}:\d{2}.*")


def iso_date(value: object) -> str:
    """Give a date as `YYYY-MM-DD`, or "" when it is none or could be read in two ways.

    A year or a month alone becomes its first day; a time of day is dropped. `01/02/2021` is "".

    Args:
        value: a string, a whole number (a year), a date or a datetime; anything else is "".
    """
    if isinstance(value, datetime | date):
        return value.isoformat()[:10]
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    text = str(value).strip()
    if len(text) > _MAX_CHARS:
        return ""
    if match := _YEAR_FIRST.fullmatch(text):
        year, month, day = (int(part or 1) for part in match.groups())
        try:
            return date(year, month, day).isoformat()
        except ValueError:
            return ""
    try:
        return datetime.fromisoformat(text).date().isoformat()
    except ValueError:
        return _written_date(text)


def _written_date(text: str) -> str:
    plain = " ".join(_TIME.sub("", text).replace(",", " ").replace(".", " ").split())
    for form in _WRITTEN_FORMS:
        try:
            return datetime.strptime(plain, form).date().isoformat()
        except ValueError:
            continue
    return ""
