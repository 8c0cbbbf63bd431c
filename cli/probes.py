"""`knowstore probes`: the questions that audits ask again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .ingest import show_failures
from .output import count
from .registration import command, group
from .session import Session

probes = group("probes", "Questions with accepted answers that audits ask again.", "knowstore probes list")


@command(probes, example="knowstore probes add probes.jsonl")
def add(
    session: Session,
    file: Annotated[Path, typer.Argument(help="Rows {question, answers, kind, passage_id}, as .jsonl or .jsonl.gz.")],
    batch: Annotated[int | None, typer.Option(help="The edit batch of those without a live passage.")] = None,
) -> None:
    """Add probes to what is in the store already; `ingest --probes` adds them together with their passages.

    Kinds: reliability asks for a fact, paraphrase in other words, portability for what follows from it, locality
    for what no passage is about, removed for what must not be known.
    """
    from knowstore.audits import add_probes, read_probes

    found = read_probes(file)
    with session.open() as store:
        if batch is not None:
            store.batch_items(batch)
        report = add_probes(store, found.rows, batch_id=batch)
    failures = (*found.failures, *report.failures)
    show_failures(session.output, failures)
    session.output.result(
        {
            "probes_added": report.added,
            "probes_known": report.known,
            "failures": [{"source": one.source, "error": one.error} for one in failures],
        },
        f"{count(report.added, 'probe')} added, {report.known:,} known already",
        [report.added],
    )
    if failures and not (report.added or report.known):
        raise typer.Exit(1)


@command(probes, name="list", example="knowstore probes list --batch 1")
def list_probes(
    session: Session, batch: Annotated[int | None, typer.Option(help="Only those of this edit batch.")] = None
) -> None:
    """List the probes."""
    from knowstore.audits import probe_row

    with session.open() as store:
        found = [probe for probe in store.catalog.audits.probes() if batch in (None, probe.batch_id)]
    rows = [{"id": probe.id, "batch_id": probe.batch_id, **probe_row(probe)} for probe in found]
    if session.output.is_plain:
        rows = [{**row, "answers": " | ".join(row["answers"])} for row in rows]
    session.output.listing("probes", rows, ["id", "batch_id", "kind", "question", "answers"], id_column="id")


@command(probes, example="knowstore probes make --batch 1 --output probes.jsonl")
def make(
    session: Session,
    batch: Annotated[int | None, typer.Option(help="Only from passages of this edit batch.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="From at most so many passages.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write them to this file, and do not add them.")] = None,
) -> None:
    """Let the language model ask a question of each passage; kept are those whose answer stands in it.

    They are added to the store, or with --output written to a file to be read over and given to `probes add`.
    """
    from knowstore.audits import add_probes, make_probes, probe_row, write_probes

    session.kept = "the store as it was"
    with session.open() as store:
        made = make_probes(store, batch_id=batch, limit=limit, on_progress=session.output.progress)
        if output is None:
            add_probes(store, [("", probe) for probe in made.probes])
        else:
            write_probes(output, made.probes)
    rows = [probe_row(probe) for probe in made.probes]
    record = {"tried": made.tried, "kept": len(rows), "refused": made.refused, "probes": rows}
    lines = [f"{count(len(rows), 'probe')} kept of {made.tried:,} tried"]
    lines += [f"  {n:,} refused: {reason}" for reason, n in sorted(made.refused.items())]
    session.output.result(record, "\n".join(lines), [row["question"] for row in rows])
