"""Changes by hand: `remove`, `replace`, `rollback`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowstore.errors import UnknownPassageError

from .output import Output, count, shortened
from .registration import app, command
from .session import Session, is_terminal

if TYPE_CHECKING:
    from knowstore import KnowledgeStore, PassageDetail

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would go, and change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Note = Annotated[str, typer.Option(help="Kept with the edit batch.")]


@command(app, example="knowstore remove 0f343b0931126a20f133d67c2b018a3b --dry-run")
def remove(
    session: Session,
    passage_ids: Annotated[list[str], typer.Argument(metavar="PASSAGE_ID", help="As `knowstore list` shows them.")],
    purge: Annotated[
        bool, typer.Option("--purge", help="Destroy text and tensors in every file too; no rollback brings them back.")
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    note: Note = "",
) -> None:
    """Remove passages and their experts."""
    output = session.output
    with session.open() as store:
        details = [store.show(passage_id) for passage_id in dict.fromkeys(passage_ids)]
        if not purge:
            _check_live(details)
        _show_going(output, details)
        n_passages = len(details)
        if dry_run:
            n_live = sum(detail.stored.state == "live" for detail in details)
            record = {"batch_id": None, "removed": n_live, "purged": purge, "dry_run": True}
            output.result(record, f"Would {'purge' if purge else 'remove'} {count(n_passages, 'passage')}")
            return
        verb = "Destroy for good" if purge else "Remove"
        if not session.may_delete(f"{verb} {count(n_passages, 'passage')}?", is_sure=yes):
            return
        report = store.remove(list(dict.fromkeys(passage_ids)), purge=purge, note=note)
    text = f"Edit batch {report.batch_id}: {count(report.removed, 'passage')} removed"
    if report.purged:
        text = f"{text} and purged" if report.batch_id is not None else f"{count(n_passages, 'passage')} purged"
    ids = [] if report.batch_id is None else [report.batch_id]
    output.result(
        {"batch_id": report.batch_id, "removed": report.removed, "purged": report.purged},
        text,
        ids,
    )
    if not report.purged:
        output.hint(f"undo it with `knowstore rollback {report.batch_id}`")


@command(
    app, example='knowstore replace 0f343b0931126a20f133d67c2b018a3b --text "Rome was founded in 753 BC." --dry-run'
)
def replace(
    session: Session,
    passage_id: Annotated[str, typer.Argument(help="The passage that goes.", show_default=False)],
    text: Annotated[str | None, typer.Option(help="The new text.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the new text from this file; - is stdin.")] = None,
    title: Annotated[str | None, typer.Option(help="The new title, the old one if not given.")] = None,
    date: Annotated[str | None, typer.Option(help="The new date (YYYY-MM-DD), the old one if not given.")] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    note: Note = "",
) -> None:
    """Put a new text in a passage's place; its source stays, and ingesting that again brings back what it says."""
    from knowstore import Passage

    output, new_text = session.output, _new_text(text, file)
    with session.open() as store:
        detail = store.show(passage_id)
        _check_live([detail])
        old = detail.stored.passage
        new = Passage(
            text=new_text,
            title=old.title if title is None else title,
            source=old.source,
            date=old.date if date is None else date,
        )
        new = store.check_replacement(passage_id, new)
        _show_going(output, [detail])
        if dry_run:
            record = {"batch_id": None, "passage_id": new.passage_id, "replaced": passage_id, "dry_run": True}
            output.result(record, f"Would put passage {new.passage_id} in its place")
            return
        if not session.may_delete("Replace it?", is_sure=yes):
            return
        batch = store.replace(passage_id, new, note=note)
    output.result(
        {"batch_id": batch.id, "passage_id": new.passage_id, "replaced": passage_id},
        f"Edit batch {batch.id}: passage {new.passage_id} in place of {passage_id}",
        [new.passage_id],
    )
    output.hint(f"undo it with `knowstore rollback {batch.id}`")


@command(app, example="knowstore rollback 1 --dry-run")
def rollback(
    session: Session,
    batch_id: Annotated[int, typer.Argument(help="As `knowstore batches` shows it.", show_default=False)],
    dry_run: DryRun = False,
    yes: Yes = False,
    note: Note = "",
) -> None:
    """Restore what was live right before an edit batch.

    That undoes the batch and every later one. A rollback destroys nothing and is an edit batch that can be
    rolled back itself, so it is asked about at a terminal, and goes ahead where there is none.
    """
    output = session.output
    with session.open() as store:
        preview = _show_rollback(output, store, batch_id)
        if dry_run:
            output.result({"batch_id": None, **preview, "dry_run": True}, "")
            return
        if is_terminal() and not session.may_delete(f"Go back to before edit batch {batch_id}?", is_sure=yes):
            return
        report = store.rollback(batch_id, note=note)
    record = {"batch_id": report.batch_id, "restored": report.restored, "removed": report.removed}
    if report.batch_id is None:
        output.result(record, "Nothing to roll back: the store is as it was before that edit batch")
        return
    output.result(
        record,
        f"Edit batch {report.batch_id}: {count(report.restored, 'passage')} restored, {report.removed:,} removed",
        [report.batch_id],
    )
    output.hint(f"undo it with `knowstore rollback {report.batch_id}`")


def _show_rollback(output: Output, store: KnowledgeStore, batch_id: int) -> dict[str, int]:
    preview = store.rollback_preview(batch_id)
    undone = [batch for batch in store.batches() if batch.id >= batch_id and batch.state == "live"]
    if output.is_plain:
        output.note(
            f"Undoes {count(len(undone), 'edit batch')}: {count(preview.restored, 'passage')} would come back, "
            f"{preview.removed:,} would go"
        )
        rows = [{"id": batch.id, "kind": batch.kind, "note": batch.note} for batch in undone]
        output.table(rows, ["id", "kind", "note"], to_stderr=True)
    return {"restored": preview.restored, "removed": preview.removed}


def _check_live(details: list[PassageDetail]) -> None:
    """Raise UnknownPassageError for passages that were removed before."""
    gone = [detail.stored.passage_id for detail in details if detail.stored.state != "live"]
    if gone:
        raise UnknownPassageError(
            f"passage {gone[0]} was removed already" + (f" (and {len(gone) - 1} more)" if gone[1:] else ""),
            kept="the store is as it was",
            fix="leave it out; `knowstore remove --purge` destroys it, `knowstore rollback` brings it back",
        )


def _show_going(output: Output, details: list[PassageDetail]) -> None:
    rows: list[dict[str, Any]] = [
        {
            "passage_id": detail.stored.passage_id,
            "title": detail.stored.passage.title,
            "source": detail.stored.passage.source,
            "text": shortened(detail.stored.passage.text),
        }
        for detail in details
    ]
    if output.is_plain:
        output.note("What goes:")
        output.table(rows, ["passage_id", "title", "source", "text"], to_stderr=True)


def _new_text(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise typer.BadParameter("give the new text by one of --text and --file", param_hint="--text")
    if text is not None:
        return text
    assert file is not None
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} cannot be read: {error}", param_hint="--file") from error
