"""`knowstore bench`: measurements that report numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from knowstore.records import Mode

from .registration import command, group
from .session import Session

bench = group(
    "bench", "Measure what experts carry, and how long questions take.", "knowstore bench controls --data qa.jsonl"
)


@command(bench, example="knowstore bench controls --data qa.jsonl --limit 100")
def controls(
    session: Session,
    data: Annotated[
        list[Path],
        typer.Option(
            help="QA rows {question, answers, passage: {title, text}} as .jsonl or .jsonl.gz; may be repeated."
        ),
    ],
    limit: Annotated[int, typer.Option(min=2, help="Questions of each file.")] = 200,
    seed: Annotated[int, typer.Option(help="Draws the questions.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for controls.json and, with the extra `plots`, controls.png.")
    ] = None,
) -> None:
    """Score answers with no expert, the static one, another passage's and the right one; needs no store."""
    from knowstore.bench import plot_controls, run_controls

    session.kept = "nothing, for a measurement changes nothing"
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = run_controls(
        data, models=session.model_config(), limit=limit, seed=seed, on_progress=session.output.progress
    )
    rows: list[dict[str, Any]] = found["rows"]
    if output is not None:
        _keep(session, output / "controls", found, lambda path: plot_controls(rows, path))
    if session.output.is_plain and rows:
        session.output.table([{name: _cell(value) for name, value in row.items()} for row in rows], list(rows[0]))
    else:
        session.output.result(found, "")


@command(
    bench, example="knowstore bench methods --edits counterfact_test.jsonl.gz --method rag --method lora --limit 30"
)
def methods(
    session: Session,
    data: Annotated[
        list[Path], typer.Option(help="QA rows {question, answers, passage: {title, text}}; may be repeated.")
    ] = [],  # noqa: B006 - typer's own way to say none
    edits: Annotated[
        list[Path], typer.Option(help="Edit sets {subject, prompt, target_new, ...}; may be repeated.")
    ] = [],  # noqa: B006
    method: Annotated[
        list[str],
        typer.Option(
            help="base, rag, experts, found, lora, memit, mend or malmen; may be repeated. All usable if not given."
        ),
    ] = [],  # noqa: B006
    corpus: Annotated[
        list[Path], typer.Option(help="Passages {title, text} of usual text, which MEMIT needs; may be repeated.")
    ] = [],  # noqa: B006
    train: Annotated[
        list[Path], typer.Option(help="Edit sets to train the networks of mend and malmen on; may be repeated.")
    ] = [],  # noqa: B006
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Teach all passages one after another before asking.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Passages or edits of each file.")] = 100,
    seed: Annotated[int, typer.Option(help="Draws them.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for methods.json and, with the extra `plots`, methods.png.")
    ] = None,
) -> None:
    """Compare ways to teach the frozen model: what they teach, what they harm, what they take; needs no store."""
    from knowstore.baselines import usable_methods
    from knowstore.bench import plot_methods, run_methods

    if not data and not edits:
        raise typer.BadParameter("give at least one file", param_hint="--data or --edits")
    session.kept = "nothing, for a measurement changes nothing"
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        session.kept = f"what was measured so far, in {output / 'methods.json'}"
    for name, lacks in usable_methods(corpus, train).items() if not method else ():
        if lacks:
            session.output.hint(f"{name} is left out, it needs {lacks}")
    found: dict[str, Any] = run_methods(
        [*data, *edits], corpus=corpus, train=train, models=session.model_config(), is_sequential=sequential,
        limit=limit, seed=seed, methods=method, on_progress=session.output.progress,
        on_found=None if output is None else lambda some: _write(output / "methods.json", some),
    )  # fmt: skip
    if output is not None:
        _keep(session, output / "methods", found, lambda path: plot_methods(found["rows"], found["costs"], path))
    if not session.output.is_plain:
        session.output.result(found, "")
        return
    for rows in (found["rows"], found["costs"]):
        session.output.table([{name: _cell(value) for name, value in row.items()} for row in rows], list(rows[0]))


@command(bench, example="knowstore bench rerank --data qa.jsonl --corpus passages.jsonl.gz")
def rerank(
    session: Session,
    data: Annotated[
        Path, typer.Option(help="QA rows {question, answers, passage: {title, text}} as .jsonl or .jsonl.gz.")
    ],
    corpus: Annotated[list[Path], typer.Option(help="Passages {title, text} to find them among; may be repeated.")],
    limit: Annotated[int, typer.Option(min=1, help="Questions that are asked.")] = 200,
    candidates: Annotated[int, typer.Option(min=1, help="Passages that are proposed to the reranker.")] = 20,
    seed: Annotated[int, typer.Option(help="Draws the questions.")] = 0,
) -> None:
    """Count how often the right passage comes first in a corpus, before and after the reranker; needs no store."""
    from knowstore.bench import run_rerank

    session.kept = "nothing, for a measurement changes nothing"
    found: dict[str, Any] = run_rerank(
        data, corpus, models=session.model_config(), limit=limit, n_candidates=candidates, seed=seed,
        on_progress=session.output.progress,
    )  # fmt: skip
    rows: list[dict[str, Any]] = found["rows"]
    if session.output.is_plain:
        session.output.table([{name: _cell(value) for name, value in row.items()} for row in rows], list(rows[0]))
        session.output.note(f"{found['questions']} questions among {found['passages']:,} passages")
    else:
        session.output.result(found, "")


@command(bench, example="knowstore bench ask --questions qa.jsonl --limit 50")
def ask(
    session: Session,
    questions: Annotated[Path, typer.Option(help="Rows with a question, as .jsonl or .jsonl.gz.")],
    limit: Annotated[int, typer.Option(min=1, help="Questions that are asked.")] = 100,
    mode: Annotated[Mode, typer.Option(help="As for `knowstore ask`.")] = "experts",
) -> None:
    """Time each stage of `knowstore ask` on this store, with experts on disk and in memory."""
    from knowstore.bench import run_ask
    from knowstore.training import read_rows

    session.kept = "the store, which a question never changes"
    rows = islice((row for row in read_rows(questions) if isinstance(row.get("question"), str)), limit)
    with session.open() as store:
        found: dict[str, Any] = run_ask(
            store, [row["question"] for row in rows], mode=mode, on_progress=session.output.progress
        )
    timings = [
        {"experts": place, "stage": stage, **seconds}
        for place in ("cold", "warm")
        for stage, seconds in found[place].items()
    ]
    if session.output.is_plain:
        session.output.table(timings, ["experts", "stage", "p50", "p95"])
        session.output.note(f"{found['n']} questions; models were loaded in {found['load_s']:.1f} s")
    else:
        session.output.result(found, "")


def _keep(session: Session, path: Path, found: dict[str, Any], draw: Callable[[Path], None]) -> None:
    """Write what was measured beside its picture: `path` with the suffixes `.json` and `.png`."""
    from knowstore.bench import can_plot

    _write(path.with_suffix(".json"), found)
    if can_plot():
        draw(path.with_suffix(".png"))
    else:
        session.output.hint("for a picture: pip install 'knowstore[plots]'")


def _write(file: Path, found: dict[str, Any]) -> None:
    file.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def _cell(value: object) -> object:
    return "–".join(f"{one:.3f}" for one in value) if isinstance(value, list | tuple) else value
