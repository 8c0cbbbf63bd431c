"""`knowstore ingest`: files become passages and experts."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowstore.config import Codec
from knowstore.errors import SourceError

from . import audit as audits
from .engine import AddressOption, EngineOption, WorkersOption, ray_config
from .output import Output, count, size
from .registration import app, command
from .session import Session, given

if TYPE_CHECKING:
    from knowstore import IngestPlan, IngestReport, KnowledgeStore
    from knowstore.audits import ProbesFile

KEPT = "every edit batch that was committed; of this one nobody sees anything"
_LANDED = "the edit batch, which was committed"
_TOKENS_PER_WORD = 1.4  # of English; more of other languages


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
    engine: EngineOption = "here",
    workers: WorkersOption = None,
    ray_address: AddressOption = None,
) -> None:
    """Add files to the store: .txt .md .html .pdf .docx .csv .tsv .json .jsonl .parquet, and their .gz.

    What the store holds already is left alone, so an interrupted ingest is simply run again; a file that
    changed supersedes its old passages. Inputs that cannot be read are reported and the rest goes on.
    """
    from knowstore import BankConfig, ColumnMap, SplitConfig

    if dry_run and (probes or audit):
        raise typer.BadParameter("it neither keeps probes nor audits", param_hint="--dry-run")
    ray = ray_config(engine, workers, ray_address)
    session.kept = KEPT
    how: dict[str, Any] = {
        "split": SplitConfig(**given(words=words)),
        "columns": None if columns is None else ColumnMap.parse(columns),
        "stdin": sys.stdin.buffer if "-" in paths else None,
    }
    if dry_run:
        show_plan(session.output, plan(session, paths, how, codec))
        return
    asked = None if probes is None else _read_probes(probes, is_strict=strict)
    with session.open(create=True, **given(bank=BankConfig(codec=codec) if codec else None)) as store:
        _check_codec(store, codec)
        report = store.ingest(paths, strict=strict, note=note, ray=ray, **how)
        session.kept = KEPT if report.batch_id is None else _LANDED
        show_report(session.output, report, store)
        _hint_at_words(session.output, store, words)
        if asked is not None:
            keep_probes(session.output, store, asked, report)
        _finish(session, store, is_audited=audit)
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


def keep_probes(output: Output, store: KnowledgeStore, asked: ProbesFile, report: IngestReport) -> None:
    """Keep the probes of a file with what was ingested, and say how many, and which rows could not be."""
    from knowstore.audits import add_probes

    kept = add_probes(store, asked.rows, batch_id=report.batch_id)
    failures = (*asked.failures, *kept.failures)
    show_failures(output, failures)
    output.landed(
        {
            "probes_added": kept.added,
            "probes_known": kept.known,
            "failures": _failures((*report.failures, *failures)),
        },
        f"{count(kept.added, 'probe')} added, {kept.known:,} known already",
    )


def _finish(session: Session, store: KnowledgeStore, *, is_audited: bool) -> None:
    if is_audited and store.catalog.audits.probes():
        found = audits.run(session, store)
        session.output.result({"audit": found}, audits.describe(found))
        return
    if is_audited:
        session.output.hint("there are no probes to audit with: give some with --probes")
    session.output.result({}, "")


def plan(session: Session, paths: list[str], how: dict[str, Any], codec: str | None) -> IngestPlan:
    """What an ingest would do; a store that is not there is not created for it."""
    from knowstore import KnowledgeStore

    if session.has_store:
        with session.open() as store:
            _check_codec(store, codec)
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


def show_report(output: Output, report: IngestReport, store: KnowledgeStore) -> None:
    """What an ingest or an import did; the command's `Output.result` is to follow."""
    show_failures(output, report.failures)
    output.landed(
        {
            "batch_id": report.batch_id,
            "passages_added": report.passages_added,
            "passages_unchanged": report.passages_unchanged,
            "passages_superseded": report.passages_superseded,
            "failures": _failures(report.failures),
            "seconds": report.seconds,
            "seconds_in_models": report.seconds_in_models,
        },
        _report_line(report, store) if output.is_plain else "",
        [] if report.batch_id is None else [report.batch_id],
    )
    if report.batch_id is not None:
        output.hint(f"undo it with `knowstore rollback {report.batch_id}`")


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


def _hint_at_words(output: Output, store: KnowledgeStore, words: int | None) -> None:
    """Say so where passages are longer than what an expert is made of."""
    limit = store.models.hypernetwork_config.get("max_tokens")
    if words is not None and limit is not None and words * _TOKENS_PER_WORD > limit:
        output.hint(
            f"an expert is made of the first {limit} tokens of a passage, about {limit / _TOKENS_PER_WORD:.0f} words: "
            "what comes after them is found, and told only when it is read (`--mode rag`)"
        )


def _failures(failures: tuple[Any, ...]) -> list[dict[str, str]]:
    return [{"source": failure.source, "error": failure.error} for failure in failures]


def _check_codec(store: KnowledgeStore, codec: str | None) -> None:
    if codec is not None and store.codec not in (None, codec):
        raise typer.BadParameter(
            f"this store keeps its experts as {store.codec}, and a store keeps its codec", param_hint="--codec"
        )
