"""`knowstore bench`: measurements that report numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from knowstore.records import Mode

from .audit import describe_all
from .registration import command, group
from .session import Session, given

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
    counterfactual: Annotated[
        bool, typer.Option("--counterfactual", help="Give each row's counterfactual_text, and ask for its answer.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for controls.json and, with the extra `plots`, controls.png.")
    ] = None,
) -> None:
    """Score answers with no expert, the static one, another passage's and the right one; needs no store."""
    from knowstore.bench import plot_controls, run_controls

    session.kept = "nothing, for a measurement changes nothing"
    found: dict[str, Any] = run_controls(
        data, models=session.model_config(), limit=limit, seed=seed, is_counterfactual=counterfactual,
        on_progress=session.output.progress,
    )  # fmt: skip
    _finish(session, found, output, "controls", plot_controls)


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
    _finish(session, found)
    if session.output.is_plain:
        session.output.note(f"{found['questions']} questions among {found['passages']:,} passages")


@command(bench, example="knowstore bench locality --data qa.jsonl --corpus passages.jsonl.gz")
def locality(
    session: Session,
    data: Annotated[
        list[Path],
        typer.Option(help="Rows {question or prompt, answers} as .jsonl or .jsonl.gz; may be repeated."),
    ],
    corpus: Annotated[list[Path], typer.Option(help="Passages {title, text} to take experts from; may be repeated.")],
    limit: Annotated[int, typer.Option(min=1, help="Questions of each file; those answered unaided are kept.")] = 300,
    seed: Annotated[int, typer.Option(help="Draws the questions and the passages.")] = 0,
) -> None:
    """Count which answers of the model alone survive experts that are not about the question; needs no store."""
    from knowstore.bench import run_locality

    session.kept = "nothing, for a measurement changes nothing"
    found: dict[str, Any] = run_locality(
        data, corpus, models=session.model_config(), limit=limit, seed=seed, on_progress=session.output.progress
    )
    _finish(session, found)


@command(bench, example="knowstore bench answers --data qa.jsonl --corpus passages.jsonl.gz")
def answers(
    session: Session,
    data: Annotated[
        Path, typer.Option(help="QA rows {question, answers, passage: {title, text}} as .jsonl or .jsonl.gz.")
    ],
    corpus: Annotated[list[Path], typer.Option(help="Passages {title, text} to find them among; may be repeated.")],
    top_k: Annotated[list[int] | None, typer.Option(help="Passages mounted or read; may be repeated.")] = None,
    hybrid: Annotated[bool, typer.Option("--hybrid", help="Both mounted and read as well.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Questions that are asked.")] = 100,
    seed: Annotated[int, typer.Option(help="Draws the questions.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for answers.json and, with the extra `plots`, answers.png.")
    ] = None,
) -> None:
    """Score answers whose passages are found in a corpus, with 1 to 8 of them mounted or read; needs no store."""
    from knowstore.bench import plot_answers, run_answers

    session.kept = "nothing, for a measurement changes nothing"
    modes: list[Mode] = ["experts", "rag", "hybrid"] if hybrid else ["experts", "rag"]
    found: dict[str, Any] = run_answers(
        data, corpus, models=session.model_config(), modes=modes, limit=limit, seed=seed,
        on_progress=session.output.progress, **given(top_ks=top_k or None),
    )  # fmt: skip
    _finish(session, found, output, "answers", plot_answers)


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
) -> None:
    """Let a new store live through many edit batches, and audit what it still knows.

    Interrupted, it goes on where it was when it is run again.
    """
    from knowstore.bench import EditsConfig, run_edits
    from knowstore.records import Probe
    from knowstore.training import read_rows

    session.kept = "every edit batch and answer so far; run the same command again to go on"
    config = EditsConfig(
        batches, passages, updates, removals, contradictions, questions, audit_every, sample, final_sample, mode, seed
    )
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


def _finish(
    session: Session,
    found: dict[str, Any],
    output: Path | None = None,
    name: str = "",
    plot: Callable[[list[dict[str, Any]], Path], None] | None = None,
) -> None:
    """Show the rows that were found; in the folder `output` they are kept as JSON, and drawn where that can be done."""
    rows: list[dict[str, Any]] = found["rows"]
    if output is not None and plot is not None:
        output.mkdir(parents=True, exist_ok=True)
        _keep(session, output / name, found, lambda path: plot(rows, path))
    if session.output.is_plain and rows:
        session.output.table([{column: _cell(value) for column, value in row.items()} for row in rows], list(rows[0]))
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
