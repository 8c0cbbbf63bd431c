"""`knowstore ingest`: files become passages and experts."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowstore.config import Codec
from knowstore.errors import SourceError

from .audit import describe
from .audit import run as run_audit
from .output import Output, count, size
from .registration import app, command
from .session import Session, given

if TYPE_CHECKING:
    from knowstore import IngestPlan, IngestReport, KnowledgeStore
    from knowstore.audits import ProbesFile

KEPT = "every edit batch that was committed; of this one nobody sees anything"


@command(app, example="knowstore ingest README.md --note 'first try'")
def ingest(
    session: Session,
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Files, folders or globs; - reads stdin.")],
    columns: Annotated[
        str | None, typer.Option(help="Which columns of tables hold what.", metavar="text=body,title=headline")
    ] = None,
    words: Annotated[int | None, typer.Option(help="About how many words a passage has.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first input that cannot be read.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")] = False,
    note: Annotated[str, typer.Option(help="Kept with the edit batch.")] = "",
    codec: Annotated[Codec | None, typer.Option(help="How a new store keeps its experts.")] = None,
    probes: Annotated[
        Path | None, typer.Option(help="Questions for audits: rows {question, answers, kind, passage_id}.")
    ] = None,
    audit: Annotated[bool, typer.Option("--audit", help="Audit the store right afterwards.")] = False,
) -> None:
    """Add files to the store: .txt .md .html .pdf .docx .csv .tsv .json .jsonl .parquet, and their .gz.

    What the store holds already is left alone, so an interrupted ingest is simply run again; a file that
    changed supersedes its old passages. Inputs that cannot be read are reported and the rest goes on.
    """
    from knowstore import BankConfig, ColumnMap, SplitConfig

    _check_codec(session, codec)
    session.kept = KEPT
    how: dict[str, Any] = {
        "split": SplitConfig(**given(words=words)),
        "columns": None if columns is None else ColumnMap.parse(columns),
        "stdin": sys.stdin.buffer if "-" in paths else None,
    }
    if dry_run:
        show_plan(session.output, plan(session, paths, how))
        return
    asked = None if probes is None else _read_probes(probes, is_strict=strict)
    with session.open(create=True, **given(bank=BankConfig(codec=codec) if codec else None)) as store:
        report = store.ingest(paths, strict=strict, note=note, **how)
        more: dict[str, Any] = {}
        if asked is not None:
            report, more = _keep_probes(store, asked, report)
        if audit and store.catalog.audits.probes():
            more["audit"] = run_audit(session, store)
        elif audit:
            session.output.hint("there are no probes to audit with: give some with --probes")
        show_report(session.output, report, store, more)
    if report.failures and not (report.passages_added or report.passages_unchanged):
        raise typer.Exit(1)


def _read_probes(path: Path, *, is_strict: bool) -> ProbesFile:
    from knowstore.audits import read_probes

    found = read_probes(path)
    if is_strict and found.failures:
        raise SourceError(
            f"{found.failures[0].source}: {found.failures[0].error}",
            kept="the store is as it was",
            fix="mend or leave out this row, or run without --strict",
        )
    return found


def _keep_probes(store: KnowledgeStore, asked: ProbesFile, report: IngestReport) -> tuple[IngestReport, dict[str, Any]]:
    """The report with the rows of the probes file that could not be kept, and how many were."""
    from knowstore.audits import add_probes

    kept = add_probes(store, asked.rows, batch_id=report.batch_id)
    failures = (*report.failures, *asked.failures, *kept.failures)
    return replace(report, failures=failures), {"probes_added": kept.added, "probes_known": kept.known}


def plan(session: Session, paths: list[str], how: dict[str, Any]) -> IngestPlan:
    """What an ingest would do; a store that is not there is not created for it."""
    from knowstore import KnowledgeStore

    if session.has_store:
        with session.open() as store:
            return store.plan(paths, **how)
    with tempfile.TemporaryDirectory() as empty, KnowledgeStore.open(Path(empty) / "store") as store:
        return store.plan(paths, **how)


def show_plan(output: Output, plan: IngestPlan) -> None:
    """What an ingest would do."""
    show_failures(output, plan.failures)
    output.result(
        {
            "dry_run": True,
            "passages_added": plan.new,
            "passages_unchanged": plan.unchanged,
            "passages_superseded": plan.superseded,
            "sources": plan.sources,
            "failures": _failures(plan.failures),
        },
        f"Would add {count(plan.new, 'passage')} from {count(plan.sources, 'source')}; "
        f"{plan.unchanged:,} unchanged, {plan.superseded:,} superseded",
    )


def show_report(
    output: Output, report: IngestReport, store: KnowledgeStore, more: Mapping[str, Any] | None = None
) -> None:
    """What an ingest or an import did; `more` says what became of its probes, and what an audit found."""
    more = more or {}
    show_failures(output, report.failures)
    output.result(
        {
            "batch_id": report.batch_id,
            "passages_added": report.passages_added,
            "passages_unchanged": report.passages_unchanged,
            "passages_superseded": report.passages_superseded,
            "failures": _failures(report.failures),
            "seconds": report.seconds,
            "seconds_in_models": report.seconds_in_models,
            **more,
        },
        _report_lines(report, store, more) if output.is_plain else "",
        [] if report.batch_id is None else [report.batch_id],
    )
    if report.batch_id is not None:
        output.hint(f"undo it with `knowstore rollback {report.batch_id}`")


def _report_lines(report: IngestReport, store: KnowledgeStore, more: Mapping[str, Any]) -> str:
    lines = [_report_line(report, store)]
    if "probes_added" in more:
        lines.append(f"{count(more['probes_added'], 'probe')} added, {more['probes_known']:,} known already")
    if "audit" in more:
        lines.append(describe(more["audit"]))
    return "\n".join(lines)


def _report_line(report: IngestReport, store: KnowledgeStore) -> str:
    if report.batch_id is None:
        known = count(report.passages_unchanged, "passage")
        return f"Nothing changed: {known} already in the store, {report.seconds:.1f} s"
    stats = store.stats()
    n_bytes = stats.bytes.get("experts", 0) * report.passages_added / max(stats.experts, 1)
    n = report.passages_added
    parts = [count(n, "passage"), f"{count(n, 'expert')} ({size(n_bytes)})", f"{report.seconds:.1f} s"]
    if report.passages_superseded:
        parts.append(f"{report.passages_superseded:,} superseded")
    if report.passages_unchanged:
        parts.append(f"{report.passages_unchanged:,} unchanged")
    return f"Edit batch {report.batch_id}: {', '.join(parts)}"


def show_failures(output: Output, failures: tuple[Any, ...]) -> None:
    """Inputs that could not be read, on stderr."""
    if failures and not output.as_json:
        output.note(f"{count(len(failures), 'input')} could not be read:")
        output.table(_failures(failures), ["source", "error"], to_stderr=True)


def _failures(failures: tuple[Any, ...]) -> list[dict[str, str]]:
    return [{"source": failure.source, "error": failure.error} for failure in failures]


def _check_codec(session: Session, codec: str | None) -> None:
    if codec and session.has_store:
        raise typer.BadParameter(
            f"{session.folder} exists, and a store keeps the codec that it was created with", param_hint="--codec"
        )
