"""What the store holds: `list`, `show`, `batches`, `stats`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .output import count, shortened, size
from .registration import app, command
from .session import Session, source_of

_MOST = 2**31 - 1  # of rows in a catalog
Limit = Annotated[int | None, typer.Option(min=1, max=_MOST, help="At most so many.")]
Offset = Annotated[int, typer.Option(min=0, max=_MOST, help="Skip so many first.")]


@command(app, name="list", example="knowstore list --source README.md --limit 5")
def list_passages(
    session: Session,
    source: Annotated[str | None, typer.Option(help="Only passages of this source, a path or a name.")] = None,
    limit: Limit = 50,
    offset: Offset = 0,
) -> None:
    """List the live passages."""
    with session.open() as store:
        named = None if source is None else source_of(store, source)
        found = store.passages(source=named, limit=None if limit is None else limit + 1, offset=offset)
    shown = found[:limit]
    rows = [
        {
            "passage_id": one.passage_id,
            "batch_id": one.batch_id,
            "title": one.passage.title,
            "source": one.passage.source,
            "date": one.passage.date,
            "text": one.passage.text if session.output.as_json else shortened(one.passage.text),
        }
        for one in shown
    ]
    has_more = len(found) > len(shown)
    columns = ["passage_id", "batch_id", "title", "source", "text"]
    session.output.listing("passages", rows, columns, id_column="passage_id", has_more=has_more)
    if has_more:
        session.output.hint(f"there are more: add `--offset {offset + len(shown)}`")


@command(app, example="knowstore show 0f343b0931126a20f133d67c2b018a3b")
def show(
    session: Session,
    passage_id: Annotated[str, typer.Argument(help="As `knowstore list` shows it.", show_default=False)],
) -> None:
    """Show a passage and what is known about its expert."""
    with session.open() as store:
        detail = store.show(passage_id)
    stored = detail.stored
    record: dict[str, Any] = {
        "passage_id": stored.passage_id,
        "title": stored.passage.title,
        "text": stored.passage.text,
        "source": stored.passage.source,
        "date": stored.passage.date,
        "batch_id": stored.batch_id,
        "state": stored.state,
        "expert": detail.expert,
    }
    lines = [f"{name}: {value}" for name, value in record.items() if name not in ("text", "expert") and value != ""]
    lines += [f"expert {name}: {value}" for name, value in (detail.expert or {}).items()]
    session.output.result(record, "\n".join([*lines, "", stored.passage.text]), [stored.passage_id])


@command(app, example="knowstore batches --limit 5")
def batches(
    session: Session,
    batch_id: Annotated[int | None, typer.Argument(help="Show what this edit batch changed.")] = None,
    limit: Limit = 50,
    offset: Offset = 0,
) -> None:
    """List the edit batches, newest first, or what one of them changed."""
    columns = ["id", "kind", "state", "created_at", "n_added", "n_removed", "n_superseded", "note"]
    with session.open() as store:
        if batch_id is None:
            rows = [
                {name: getattr(batch, name) for name in (*columns, "committed_at")}
                for batch in store.batches(limit=limit, offset=offset)
            ]
        else:
            items = store.batch_items(batch_id)
    if batch_id is None:
        for row in rows if session.output.is_plain else []:
            row["created_at"] = f"{row['created_at']:%Y-%m-%d %H:%M:%S}"
        session.output.listing("batches", rows, columns, id_column="id")
        return
    changes = [
        {"change": change, "passage_id": passage_id, "source": source}
        for change, pairs in items.items()
        for passage_id, source in pairs
    ]
    session.output.listing(
        "items", changes, ["change", "passage_id", "source"], id_column="passage_id", batch_id=batch_id
    )


@command(app, example="knowstore stats --json")
def stats(session: Session) -> None:
    """Count passages, experts, edit batches and bytes."""
    with session.open() as store:
        found = store.stats()
    record = {"passages": found.passages, "experts": found.experts, "batches": found.batches, "bytes": found.bytes}
    parts = ", ".join(f"{name} {size(n_bytes)}" for name, n_bytes in found.bytes.items())
    text = (
        f"{count(found.passages, 'passage')}, {count(found.experts, 'expert')}, "
        f"{count(found.batches, 'edit batch')}\nOn disk: {parts}"
    )
    session.output.result(record, text, [found.passages])
