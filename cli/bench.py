"""`knowstore bench`: measurements that report numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from knowstore.config import Codec
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
        output.mkdir(parents=True, exist_ok=True)  # not only after the questions were asked
    found: dict[str, Any] = run_controls(
        data, models=session.model_config(), limit=limit, seed=seed, on_progress=session.output.progress
    )
    rows: list[dict[str, Any]] = found["rows"]
    _keep(session, output, "controls", found, lambda path: plot_controls(rows, path))
    if session.output.is_plain and rows:
        session.output.table([{name: _cell(value) for name, value in row.items()} for row in rows], list(rows[0]))
    else:
        session.output.result(found, "")


@command(bench, example="knowstore bench codecs --data qa.jsonl --limit 100")
def codecs(
    session: Session,
    data: Annotated[
        list[Path],
        typer.Option(
            help="QA rows {question, answers, passage: {title, text}} as .jsonl or .jsonl.gz; may be repeated."
        ),
    ],
    limit: Annotated[int, typer.Option(min=2, help="Questions of each file.")] = 200,
    seed: Annotated[int, typer.Option(help="Draws the questions.")] = 0,
) -> None:
    """Count what each codec takes on disk and what it costs in right answers; needs no store."""
    from knowstore.bench import run_codecs

    session.kept = "nothing, for a measurement changes nothing"
    found: dict[str, Any] = run_codecs(
        data, models=session.model_config(), limit=limit, seed=seed, on_progress=session.output.progress
    )
    rows: list[dict[str, Any]] = found["rows"]
    if session.output.is_plain:
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


@command(bench, example="knowstore bench speed --corpus passages.jsonl.gz")
def speed(
    session: Session,
    corpus: Annotated[Path, typer.Option(help="Passages {title, text} as .jsonl or .jsonl.gz.")],
    limit: Annotated[int, typer.Option(min=24, help="Passages that are ingested.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="How often every way of answering is measured.")] = 10,
    tokens: Annotated[int, typer.Option(min=2, help="Length of each answer.")] = 16,
    top_k: Annotated[
        str, typer.Option(help="Numbers of passages behind an answer, with commas between.")
    ] = "1,2,4,8,16",
    sizes: Annotated[
        str, typer.Option(help="Experts in the banks that are read, with commas between; empty for none.")
    ] = "1000,10000",
    codec: Annotated[Codec, typer.Option(help="How experts are kept.")] = "float16",
    seed: Annotated[int, typer.Option(help="Draws the order and the experts that are read.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for speed.json and, with the extra `plots`, speed.png.")
    ] = None,
) -> None:
    """Time experts beside passages in the prompt and the bare model, ingest and reads; needs no store.

    Everything is measured in turn in one run, on a store of its own in a temporary folder. A ratio A over B is the
    time of A divided by that of B.
    """
    from knowstore.bench import SpeedConfig, plot_speed, run_speed

    session.kept = "nothing, for a measurement changes nothing"
    config = SpeedConfig(
        n_passages=limit, ks=_numbers(top_k, "--top-k"), rounds=rounds, n_tokens=tokens,
        sizes=_numbers(sizes, "--sizes"), codec=codec, seed=seed,
    )  # fmt: skip
    starts = [sys.executable, "-c", f"from {__package__} import main; main()"]
    found: dict[str, Any] = run_speed(
        corpus, models=session.model_config(), config=config, command=starts, on_progress=session.output.progress
    )
    _keep(session, output, "speed", found, lambda path: plot_speed(found, path))
    if not session.output.is_plain:
        session.output.result(found, "")
        return
    session.output.table(found["ratios"], ["name", "ratio", "low", "high"], title="Ratios of times")
    for name in ("answers", "reads", "codecs"):
        rows = [{key: _cell(value) for key, value in row.items()} for row in found[name]]
        if rows:
            session.output.table(rows, [key for key in rows[0] if not key.endswith("_quartiles")], title=name.title())
    ingest, startup = found["ingest"], found["startup"]
    session.output.note(
        f"Ingest {ingest['passages_per_s']:.1f} passages a second, forwards alone {ingest['forwards_per_s']:.1f}; "
        f"help after {startup['help_s']:.2f} s, first answer after {startup['first_ask_s']:.1f} s"
    )


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


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not whole numbers with commas between", param_hint=option) from error
    if any(number < 1 for number in numbers):
        raise typer.BadParameter("numbers start at 1", param_hint=option)
    return numbers


def _keep(
    session: Session, folder: Path | None, name: str, found: dict[str, Any], plot: Callable[[Path], None]
) -> None:
    """Write what a bench found to a folder, if one was named, with a picture where matplotlib is installed."""
    from knowstore.bench import can_plot

    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    if can_plot():
        plot(folder / f"{name}.png")
    else:
        session.output.hint("for a picture: pip install 'knowstore[plots]'")


def _cell(value: object) -> object:
    return "–".join(f"{one:.3f}" for one in value) if isinstance(value, list | tuple) else value
