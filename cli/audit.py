"""What the store still knows: `audit`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowstore.records import Mode

from .output import Output, count
from .registration import app, command
from .session import Session

if TYPE_CHECKING:
    from knowstore import KnowledgeStore

_MAX_COLUMNS = 12
_KEPT = "every answer that was given; go on with `knowstore audit --resume`"


@command(app, example="knowstore audit --sample 20")
def audit(
    session: Session,
    since: Annotated[int | None, typer.Option(help="Only probes of this edit batch and later ones.")] = None,
    batches: Annotated[str | None, typer.Option(help="Only probes of these edit batches.", metavar="1,3,5-8")] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="At most so many probes of each batch and kind, the same every time.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the sample.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the audit that was cut short last.")] = False,
    mode: Annotated[Mode, typer.Option(help="As for `knowstore ask`.")] = "experts",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Questions in one generation: more is faster, one answers as `ask` does.")
    ] = 1,
    untrained: Annotated[bool, typer.Option("--untrained", help="Allow a hypernetwork that nobody trained.")] = False,
) -> None:
    """Ask every probe again over the whole store, and say what was forgotten.

    Every answer is kept as it comes. Rows of the forgetting matrix are audits, columns the edit batches that
    probes came with.
    """
    from knowstore.audits import Selection

    chosen = None if batches is None else _numbers(batches)
    with session.open(allow_untrained=untrained) as store:
        selection = Selection(since, chosen, sample, seed)
        found = run(session, store, mode=mode, selection=selection, resume=resume, batch_size=batch_size)
    session.output.result(found, describe(found), [found["audit_id"]])
    if session.output.is_plain:
        _show_matrix(session.output, found)
        session.output.hint("look at it with `knowstore report --output report.html`")


@command(app, example="knowstore report --output report.html")
def report(
    session: Session,
    output: Annotated[
        Path, typer.Option(help="The HTML file; .json, .csv and .md are written beside it.", show_default=False)
    ],
    questions: Annotated[int, typer.Option(min=0, help="Questions of each batch that the HTML shows.")] = 100,
) -> None:
    """Write what all audits found as one HTML file that needs no network, and as JSON, CSV and Markdown."""
    from knowstore.audits import can_plot, write_report

    session.kept = "the store, which a report never changes"
    with session.open() as store:
        files = write_report(store, output, n_questions=questions)
    session.output.result(
        {"files": [str(file) for file in files]}, "\n".join(str(file) for file in files), [str(file) for file in files]
    )
    if not can_plot():
        session.output.hint("for heatmaps and curves: pip install 'knowstore[plots]'")


def run(session: Session, store: KnowledgeStore, **options: Any) -> dict[str, Any]:
    """An audit with progress; interrupted, it keeps what was answered."""
    from knowstore.audits import run_audit

    session.kept = _KEPT
    return run_audit(store, on_progress=session.output.progress, **options)


def describe(found: dict[str, Any]) -> str:
    """An audit for people, with what all audits of its mode found."""
    asked = f"{count(found['n'], 'probe')}, {found['seconds']:.1f} s, mode {found['mode']}"
    return f"Audit {found['audit_id']} after edit batch {found['batch_id']}: {asked}\n{describe_all(found)}"


def describe_all(found: dict[str, Any]) -> str:
    """What all audits of a mode found for people, in percent."""
    residue, other, contested = found["residue"], found["locality"], found["contradictions"]
    lines = []
    if found["average"] is not None:
        lines.append(
            f"Average over batches: {_percent(found['average'], found['average_ci'])} EM, "
            f"{_percent(found['average_f1'], found['average_f1_ci'])} F1"
        )
    if found["bwt"] is not None:
        same = found["same_probes"]["em"]
        lines.append(
            f"BWT: {_points(found['bwt'])} EM; of {count(same['n'], 'probe')} asked before, {same['gained']:,} gained "
            f"and {same['lost']:,} lost"
        )
    if found["uneven"]:
        lines.append(
            "Some audits asked other probes of a batch than others: the matrix and BWT compare different ones."
        )
    if other["n"]:
        lines.append(f"Unrelated questions answered as before: {_percent(other['same'], other['same_ci'])}")
    if contested["n"]:
        both = contested["both_retrieved"]
        lines.append(
            f"Contradictions with both passages retrieved: {both['n']:,} of {contested['n']:,}; the newer is told "
            f"{both['newer']:,} times, the older {both['older']:,}, neither {both['neither']:,}"
        )
    if residue["n"]:
        lines.append(
            f"Removed facts: {residue['leaked']:,} of {residue['n']:,} leak ({residue['answered']:,} answered, "
            f"{residue['known']:,} of them by the untouched model too, {residue['told']:,} told by a live passage)"
        )
    return "\n".join(lines)


def _show_matrix(output: Output, found: dict[str, Any]) -> None:
    batches = found["batches"]
    if not found["matrix"]:
        return
    if len(batches) > _MAX_COLUMNS:
        output.note(f"The matrix has {len(batches)} columns: see --json, or the report.")
        return
    rows = [
        {"after batch": str(after), **{f"EM of {batch}": value for batch, value in zip(batches, row, strict=True)}}
        for after, row in zip(found["audited"], found["matrix"], strict=True)
    ]
    output.table(rows, list(rows[0]))


def _numbers(text: str) -> tuple[int, ...]:
    """Batch ids as they are typed: `1,3,5-8`."""
    try:
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    except ValueError:
        ends = []
    if not ends or any(len(some) > 2 or some[0] > some[-1] for some in ends):
        raise typer.BadParameter(f"{text!r} is no list such as 1,3,5-8", param_hint="--batches")
    return tuple(number for some in ends for number in range(some[0], some[-1] + 1))


def _percent(value: float, interval: list[float]) -> str:
    return f"{100 * value:.1f} % ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points"
