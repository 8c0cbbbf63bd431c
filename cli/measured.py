"""What the commands of `knowstore bench` share: rows shown as a table, kept as JSON and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from .session import Session


def finish(
    session: Session,
    found: dict[str, Any],
    output: Path | None = None,
    name: str = "",
    plot: Callable[[list[dict[str, Any]], Path], None] | None = None,
) -> None:
    """Show the rows that were found; in the folder `output` they are kept as JSON, and drawn where that can be done."""
    rows: list[dict[str, Any]] = found["rows"]
    if session.output.is_plain and rows:
        session.output.table([{column: cell(value) for column, value in row.items()} for row in rows], list(rows[0]))
    else:
        session.output.result(found, "")
    if plot is not None:
        keep(session, output, name, found, lambda path: plot(rows, path))


def numbers(text: str, option: str, *, least: int = 1) -> tuple[int, ...]:
    """Whole numbers with commas between, none under `least`."""
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not whole numbers with commas between", param_hint=option) from error
    if not found:
        raise typer.BadParameter("no number is named", param_hint=option)
    if any(number < least for number in found):
        raise typer.BadParameter(f"numbers start at {least}", param_hint=option)
    return found


def keep(session: Session, folder: Path | None, name: str, found: dict[str, Any], plot: Callable[[Path], None]) -> None:
    """Write what a bench found to a folder, if one was named, with a picture where matplotlib is installed."""
    if folder is None:
        return
    write(folder / f"{name}.json", found)
    draw(session, folder / f"{name}.png", plot)


def make(folder: Path | None) -> None:
    """Make the folder that takes the figures before they are measured, so that none is measured in vain."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)


def draw(session: Session, path: Path, plot: Callable[[Path], None]) -> None:
    """Draw a picture where matplotlib is installed; elsewhere say how it can be had."""
    from knowstore.bench import can_plot

    if can_plot():
        plot(path)
    else:
        session.output.hint("for a picture: pip install 'knowstore[plots]'")


def write(file: Path, found: dict[str, Any]) -> None:
    """Keep what a bench found as JSON."""
    file.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def cell(value: object) -> object:
    """A value as a table shows it: of an interval both ends."""
    return "–".join(f"{one:.3f}" for one in value) if isinstance(value, list | tuple) else value
