"""Looking after a store: `verify`, `export`, `import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .ingest import KEPT, keep_probes, show_report
from .output import count
from .registration import app, command
from .session import Session

if TYPE_CHECKING:
    from knowstore.records import Probe


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
    """Write the live passages, their experts and probes to a folder that `knowstore import` reads."""
    from knowstore.audits import live_probes, probes_text

    with session.open() as store:
        probes: list[Probe] = []

        def rows() -> str:
            probes[:] = live_probes(store)
            return probes_text(probes)

        n_passages = store.export(folder, probes=rows)
    said = " and ".join([count(n_passages, "passage"), *([count(len(probes), "probe")] if probes else [])])
    record = {"folder": str(folder), "passages": n_passages, "probes": len(probes)}
    session.output.result(record, f"{said} in {folder}", [n_passages])
    session.output.hint(f"read it into another store with `knowstore --store DIR import {folder}`")


@command(app, name="import", example="knowstore --store copy import backup")
def import_(
    session: Session,
    folder: Annotated[Path, typer.Argument(help="What `knowstore export` wrote.", show_default=False)],
    note: Annotated[str, typer.Option(help="Kept with the edit batch.")] = "",
) -> None:
    """Add what `knowstore export` wrote, as one edit batch."""
    from knowstore.audits import read_probes
    from knowstore.store import PROBES_FILE

    session.kept = KEPT
    asked = read_probes(folder / PROBES_FILE) if (folder / PROBES_FILE).is_file() else None
    with session.open(create=True) as store:
        report = store.import_(folder, note=note)
        show_report(session.output, report, store)
        if asked is not None and asked.rows and store.catalog.head():
            keep_probes(session.output, store, asked, report)
    session.output.result({}, "")
