"""`knowstore bench`: measurements that report numbers."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from knowstore.records import Mode

from .audit import describe_all
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
    from knowstore.bench import can_plot, plot_controls, run_controls

    session.kept = "nothing, for a measurement changes nothing"
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = run_controls(
        data, models=session.model_config(), limit=limit, seed=seed, on_progress=session.output.progress
    )
    rows: list[dict[str, Any]] = found["rows"]
    if output is not None:
        (output / "controls.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
        if can_plot():
            plot_controls(rows, output / "controls.png")
        else:
            session.output.hint("for a picture: pip install 'knowstore[plots]'")
    if session.output.is_plain and rows:
        session.output.table([{name: _cell(value) for name, value in row.items()} for row in rows], list(rows[0]))
    else:
        session.output.result(found, "")


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


@command(bench, example="knowstore bench edits --data qa.jsonl --batches 4 --passages 10 --output edits")
def edits(
    session: Session,
    data: Annotated[
        list[Path],
        typer.Option(
            help="QA rows {question, answers, passage: {title, text}} as .jsonl or .jsonl.gz; may be repeated."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the store, edits.json and the report.")],
    corpus: Annotated[
        list[Path] | None, typer.Option(help="Passages {title, text} that fill the batches where questions lack.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Edit batches.")] = 40,
    passages: Annotated[int, typer.Option(min=1, help="Passages of each.")] = 250,
    updates: Annotated[float, typer.Option(help="Share of them that replace an older one.")] = 0.10,
    removals: Annotated[float, typer.Option(help="Older ones that each batch removes, as a share of its own.")] = 0.05,
    contradictions: Annotated[float, typer.Option(help="Share of them that contradict an older one.")] = 0.05,
    questions: Annotated[int, typer.Option(min=1, help="Questions on each passage, at most.")] = 1,
    unrelated: Annotated[
        Path | None, typer.Option(help="Rows with a question and answers that no passage is about.")
    ] = None,
    n_unrelated: Annotated[int, typer.Option(min=1, help="At most so many of them.")] = 100,
    audit_every: Annotated[int, typer.Option(min=0, help="Audit after every so many batches too; 0 is never.")] = 0,
    sample: Annotated[int | None, typer.Option(min=1, help="Probes of each batch in those audits.")] = None,
    final_sample: Annotated[int | None, typer.Option(min=1, help="Probes of each batch in the last audit.")] = None,
    mode: Annotated[Mode, typer.Option(help="As for `knowstore ask`.")] = "experts",
    seed: Annotated[int, typer.Option(help="Draws passages and edits.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions in one generation of an audit.")] = 16,
) -> None:
    """Let a new store live through many edit batches, and audit what it still knows.

    Interrupted, it goes on where it was when it is run again.
    """
    from knowstore.bench import EditsConfig, run_edits
    from knowstore.records import Probe
    from knowstore.training import read_rows

    session.kept = "every edit batch and answer so far; run the same command again to go on"
    config = EditsConfig(
        batches, passages, updates, removals, contradictions, questions, audit_every, sample, final_sample, mode, seed,
        batch_size,
    )  # fmt: skip
    rows = islice(read_rows(unrelated), n_unrelated) if unrelated is not None else ()
    found = run_edits(
        data, output, config=config, corpus=corpus or (), models=session.model_config(),
        on_progress=session.output.progress,
        unrelated=[Probe(row["question"], tuple(row["answers"]), "locality") for row in rows],
    )  # fmt: skip
    session.output.result(found, f"{describe_all(found)}\n{output / 'report.html'}", [output / "report.html"])


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


def _cell(value: object) -> object:
    return "–".join(f"{one:.3f}" for one in value) if isinstance(value, list | tuple) else value
