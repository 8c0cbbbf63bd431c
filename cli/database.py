"""`knowstore db`: the catalog's schema."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from .output import count
from .registration import command, group
from .session import Session

if TYPE_CHECKING:
    from knowstore import Catalog

CATALOG_FILE = "catalog.sqlite"
db = group("db", "The schema of the catalog's database, which opening a store keeps up to date.", "knowstore db check")


def open_catalog(session: Session) -> Catalog:
    """The store's catalog as it is, not migrated."""
    from knowstore import Catalog

    if session.is_remote and session.catalog is None:
        raise typer.BadParameter("a store in an object store has its catalog elsewhere", param_hint="--catalog")
    return Catalog.open(session.catalog or session.folder / CATALOG_FILE, migrate=False)


@command(db, example="knowstore db upgrade")
def upgrade(session: Session) -> None:
    """Bring the schema to the revision that this version works with."""
    with open_catalog(session) as catalog:
        before = catalog.schema_current()
        catalog.upgrade()
        after = catalog.schema_current()
    text = f"Schema is at {after} already" if before == after else f"Schema went from {before or 'nothing'} to {after}"
    session.output.result({"before": before, "current": after}, text, [after])


@command(db, example="knowstore db current")
def current(session: Session) -> None:
    """Show the schema's revision, and the one that this version works with."""
    with open_catalog(session) as catalog:
        found, head = catalog.schema_current(), catalog.schema_head()
    state = "up to date" if found == head else f"this version works with {head}"
    session.output.result({"current": found, "head": head}, f"{found or 'no schema yet'} ({state})", [found])
    if found != head:
        session.output.hint("run `knowstore db upgrade`")


@command(db, example="knowstore db check")
def check(session: Session) -> None:
    """Compare the tables with what they should be; exit with 1 when they differ."""
    with open_catalog(session) as catalog:
        found, head = catalog.schema_current(), catalog.schema_head()
        differences = catalog.check()
    is_clean = found == head and not differences
    lines = [f"schema {found or 'none'}, this version works with {head}"] if found != head else []
    text = "Clean" if is_clean else "\n".join([*lines, count(len(differences), "difference"), *differences])
    record = {"clean": is_clean, "current": found, "head": head, "differences": differences}
    session.output.result(record, text, differences)
    if not is_clean:
        raise typer.Exit(1)
