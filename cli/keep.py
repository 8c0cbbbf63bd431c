"""Looking after a store: `verify`, `export`, `import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .ingest import KEPT, show_report
from .output import count
from .registration import app, command
from .session import Session


@command(app, example="knowstore verify")
def verify(
    session: Session, repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended.")] = False
) -> None:
    """Check that the catalog, the passages and the experts agree; exit with 1 when they do not."""
    output = session.output
    with session.open() as store:
        report = store.verify(repair=repair)
    problems = [{"kind": one.kind, "detail": one.detail, "fix": one.fix} for one in report.problems]
    checked = ", ".join(f"{number:,} {name}" for name, number in report.checked.items())
    state = "Clean" if report.clean else count(len(problems), "problem")
    output.result(
        {"clean": report.clean, "problems": problems, "checked": report.checked},
        f"{state} ({checked})" if checked else state,
        [one["kind"] for one in problems],
    )
    if problems and output.is_plain:
        output.table(problems, ["kind", "detail", "fix"])
    if not report.clean:
        if not repair:
            output.hint("mend what can be mended with `knowstore verify --repair`")
        raise typer.Exit(1)


@command(app, example="knowstore export backup")
def export(
    session: Session, folder: Annotated[Path, typer.Argument(help="A folder that is new or empty.", show_default=False)]
) -> None:
    """Write the live passages and their experts to a folder that `knowstore import` reads."""
    with session.open() as store:
        n_passages = store.export(folder)
    session.output.result(
        {"folder": str(folder), "passages": n_passages}, f"{count(n_passages, 'passage')} in {folder}", [n_passages]
    )
    session.output.hint(f"read it into another store with `knowstore --store DIR import {folder}`")


@command(app, name="import", example="knowstore --store copy import backup")
def import_(
    session: Session,
    folder: Annotated[Path, typer.Argument(help="What `knowstore export` wrote.", show_default=False)],
    note: Annotated[str, typer.Option(help="Kept with the edit batch.")] = "",
) -> None:
    """Add what `knowstore export` wrote, as one edit batch."""
    session.kept = KEPT
    with session.open(create=True) as store:
        show_report(session.output, store.import_(folder, note=note), store)
    session.output.result({}, "")
