"""Changing a store over to another hypernetwork or language model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .edit import DryRun, Yes
from .engine import AddressOption, EngineOption, WorkersOption, ray_config
from .output import count, size
from .registration import app, command
from .session import Session

if TYPE_CHECKING:
    from knowstore import KnowledgeStore

_KEPT = "the store as it was, and the experts generated so far, which the next run goes on with"


@command(app, example="knowstore --hypernetwork FOLDER reexpert")
def reexpert(
    session: Session,
    undo: Annotated[bool, typer.Option("--undo", help="Back to the models that the store had before.")] = False,
    drop_previous: Annotated[
        bool, typer.Option("--drop-previous", help="Delete the experts that are kept for an undo.")
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    engine: EngineOption = "here",
    workers: WorkersOption = None,
    ray_address: AddressOption = None,
) -> None:
    """Generate every expert anew by the hypernetwork and language model that are named, and change over to them.

    Questions are answered meanwhile, by the experts of before. Interrupted, it goes on where it was.
    """
    if undo and drop_previous:
        raise typer.BadParameter("what is deleted cannot be undone", param_hint="--drop-previous")
    if dry_run and not drop_previous:
        raise typer.BadParameter("it shows what --drop-previous would delete", param_hint="--dry-run")
    ray = ray_config(engine, workers, ray_address)
    if ray is not None and drop_previous:
        raise typer.BadParameter("no model runs to delete experts", param_hint="--engine")
    output = session.output
    session.kept = _KEPT
    with session.open() as store:
        if drop_previous:
            _drop(session, store, is_dry=dry_run, is_sure=yes)
            return
        report = store.reexpert(is_undone=undo, ray=ray)
    is_same = report.fingerprint == report.previous
    made = f"{count(report.generated, 'expert')} generated, {report.reused:,} were there, {report.seconds:.1f} s"
    output.result(
        {
            "fingerprint": report.fingerprint,
            "previous": report.previous,
            "generated": report.generated,
            "reused": report.reused,
            "seconds": report.seconds,
        },
        "The store uses these models already" if is_same else made,
        [report.fingerprint],
    )
    if not is_same:
        undoing = "" if undo else "undo it with `knowstore reexpert --undo`, or "
        output.hint(f"{undoing}free the space with `knowstore reexpert --drop-previous`")


def _drop(session: Session, store: KnowledgeStore, *, is_dry: bool, is_sure: bool) -> None:
    """Show the banks of other models, and unless it is a dry run ask and delete them."""
    session.kept = (
        "the experts in use; of those of other models what was not deleted yet, which running it again deletes"
    )
    output, banks = session.output, [asdict(bank) for bank in store.kept_banks()]
    names = [bank["name"] for bank in banks]
    record = {"dropped": 0, "dry_run": is_dry, "banks": banks}
    if not banks:
        output.result(record, "There are no experts of other models")
        return
    if output.is_plain:
        output.note("What goes:")
        output.table(banks, list(banks[0]), to_stderr=True)
    what = f"{count(len(banks), 'bank')} of other models ({size(sum(bank['size_bytes'] for bank in banks))})"
    if is_dry:
        output.result(record, f"Would delete {what}", names)
    elif session.may_delete(f"Delete {what}? Then there is no undo.", is_sure=is_sure):
        output.result(record | {"dropped": store.drop_previous()}, f"{what} deleted", names)
