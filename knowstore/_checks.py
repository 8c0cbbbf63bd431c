"""Checks of what callers and the catalog hand to a store, before anything is done with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from knowstore.errors import ConfigError, PassageError
from knowstore.records import Mode, Passage
from knowstore.sources import iso_date


def check_mode(mode: str) -> None:
    """Raise ConfigError unless `mode` is a way of asking."""
    if mode not in get_args(Mode):
        fix = f"use one of {', '.join(get_args(Mode))}"
        raise ConfigError(f"mode is {mode!r}", kept="nothing was asked", fix=fix)


def checked_questions(questions: Sequence[str]) -> list[str]:
    """Questions that can be encoded: half characters, as a command line may give them, become question marks."""
    if any(not question.strip() for question in questions):
        raise ConfigError("the question is empty", kept="nothing was asked", fix="ask something")
    return [question.encode("utf-8", "replace").decode() for question in questions]


def checked_passages(passages: Sequence[Passage]) -> list[Passage]:
    """The passages with their dates as `YYYY-MM-DD`.

    Raises:
        PassageError: a passage without a text, with one that cannot be encoded, or with a date that cannot be read.
    """
    empty = [passage.title for passage in passages if not passage.text.strip()]
    if empty:
        raise PassageError(
            f"{len(empty)} passages without text, titled {empty[0]!r} first",
            kept="the store is as it was",
            fix="leave out passages without text",
        )
    unreadable = [passage.title for passage in passages if not _is_unicode(passage)]
    if unreadable:
        raise PassageError(
            f"{len(unreadable)} passages with half characters (lone surrogates), titled {unreadable[0]!r} first",
            kept="the store is as it was",
            fix="decode the texts with the encoding that they were written in",
        )
    dates = [iso_date(passage.date) for passage in passages]
    undated = [passage.date for passage, date in zip(passages, dates, strict=True) if passage.date and not date]
    if undated:
        raise PassageError(
            f"{len(undated)} passages have a date that is none or could be read in two ways, {undated[0]!r} first",
            kept="the store is as it was",
            fix="write dates as YYYY-MM-DD, or leave them empty",
        )
    return [replace(passage, date=date) for passage, date in zip(passages, dates, strict=True)]


def _is_unicode(passage: Passage) -> bool:
    try:
        "".join((passage.title, passage.text, passage.source, passage.date)).encode()
    except UnicodeEncodeError:
        return False
    return True
