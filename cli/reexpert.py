"""Changing a store over to another hypernetwork or language model."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import count
from .registration import app, command
from .session import Session

_KEPT = "the store as it was, and the experts generated so far, which the next run goes on with"


@command(app, example="knowstore --hypernetwork FOLDER reexpert")
def reexpert(
    session: Session,
    undo: Annotated[bool, typer.Option("--undo", help="Back to the models that the store had before.")] = False,
    drop_previous: Annotated[
        bool, typer.Option("--drop-previous", help="Delete the experts that are kept for an undo.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """Generate every expert anew by the hypernetwork and language model that are named, and change over to them.

    Questions are answered meanwhile, by the experts of before. Interrupted, it goes on where it was.
    """
    if undo and drop_previous:
        raise typer.BadParameter("what is deleted cannot be undone", param_hint="--drop-previous")
    output = session.output
    session.kept = _KEPT
    with session.open() as store:
        if drop_previous:
            question = "Delete the experts of other models? Then there is no undo."
            if session.may_delete(question, is_sure=yes):
                n_banks = store.drop_previous()
                output.result({"dropped": n_banks}, f"{count(n_banks, 'bank')} of other models deleted", [n_banks])
            return
        report = store.reexpert(is_undone=undo)
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
        output.hint("undo it with `knowstore reexpert --undo`, or free the space with `--drop-previous`")
