"""`knowstore bench`: measurements that report numbers."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from knowstore.config import BankConfig, Codec
from knowstore.records import Mode

from .audit import describe_all
from .measured import cell, finish, keep, make, numbers, write
from .registration import command, group
from .session import Session, given

QuestionFiles = Annotated[
    list[Path],
    typer.Option(help="QA rows {question, answers, passage: {title, text}} as .jsonl or .jsonl.gz; may be repeated."),
]
QuestionFile = Annotated[
    Path, typer.Option(help="QA rows {question, answers, passage: {title, text}} as .jsonl or .jsonl.gz.")
]
Corpus = Annotated[list[Path], typer.Option(help="Passages {title, text} to find them among; may be repeated.")]
UsualText = Annotated[
    list[Path], typer.Option(help="Passages {title, text} of usual text, which MEMIT needs; may be repeated.")
]
EditorSets = Annotated[
    list[Path], typer.Option(help="Edit sets to train the networks of mend and malmen on; may be repeated.")
]
EditorSteps = Annotated[int, typer.Option(min=1, help="Training steps of the networks of mend and malmen.")]
LimitOfFiles = Annotated[int, typer.Option(min=2, help="Questions of each file.")]
Limit = Annotated[int, typer.Option(min=1, help="Questions that are asked.")]
QuestionSeed = Annotated[int, typer.Option(help="Draws the questions.")]

NOTHING = "nothing, for a measurement changes nothing"

bench = group(
    "bench", "Measure what experts carry, and how long questions take.", "knowstore bench controls --data qa.jsonl"
)


@command(bench, example="knowstore bench controls --data qa.jsonl --limit 100")
def controls(
    session: Session,
    data: QuestionFiles,
    limit: LimitOfFiles = 200,
    seed: QuestionSeed = 0,
    method: Annotated[
        list[str], typer.Option(help='One to measure, such as "tokens" or "rag, tuned"; may be repeated.')
    ] = [],  # noqa: B006
    counterfactual: Annotated[
        bool, typer.Option("--counterfactual", help="Give each row's counterfactual_text, and ask for its answer.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for controls.json and, with the extra `plots`, controls.png.")
    ] = None,
) -> None:
    """Score answers with no expert, the static one, another passage's and the right one; needs no store.

    Methods: `base`, the model alone; `rag`, the passage in the prompt; the hypernetwork's kind, such as `tokens`, its
    experts' words weighed as `ask` does, and of a kind that tells sentences apart also `tokens, sentences` and
    `tokens, passages`, weighed at these grains, and `tokens, sentence known`; with a reader `rag, tuned` and `hybrid`.
    Controls: `none`, `static`, `shuffled` is another question's passage, `gold` the right one.
    """
    from knowstore.bench import plot_controls, run_controls

    session.kept = NOTHING
    make(output)
    found: dict[str, Any] = run_controls(
        data, methods=method, models=session.model_config(), limit=limit, seed=seed, is_counterfactual=counterfactual,
        on_progress=session.output.progress,
    )  # fmt: skip
    finish(session, found, output, "controls", plot_controls)


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
            help="base, rag, experts, found, read, lora, memit, mend, malmen; may be repeated. All usable if not given."
        ),
    ] = [],  # noqa: B006
    corpus: UsualText = [],  # noqa: B006
    train: EditorSets = [],  # noqa: B006
    editor_steps: EditorSteps = 500,
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
    session.kept = NOTHING
    make(output)
    if output is not None:
        session.kept = f"what was measured so far, in {output / 'methods.json'}"
    for name, lacks in usable_methods(corpus, train).items() if not method else ():
        if lacks:
            session.output.hint(f"{name} is left out, it needs {lacks}")
    found: dict[str, Any] = run_methods(
        [*data, *edits], corpus=corpus, train=train, models=session.model_config(), is_sequential=sequential,
        limit=limit, seed=seed, methods=method, n_steps=editor_steps, on_progress=session.output.progress,
        on_found=None if output is None else lambda some: write(output / "methods.json", some),
    )  # fmt: skip
    keep(session, output, "methods", found, lambda path: plot_methods(found["rows"], found["costs"], path))
    if not session.output.is_plain:
        session.output.result(found, "")
        return
    for rows in (found["rows"], found["costs"]):
        session.output.table([{name: cell(value) for name, value in row.items()} for row in rows], list(rows[0]))


@command(bench, example="knowstore bench sequence --data zsre_1k.jsonl.gz --method found --method read --batches 3")
def sequence(
    session: Session,
    data: Annotated[
        Path,
        typer.Option(help="An edit set {subject, prompt, target_new, ...}, or QA rows {question, answers, passage}."),
    ],
    method: Annotated[
        list[str],
        typer.Option(help="found, read, lora, memit, mend or malmen; may be repeated. All usable if not given."),
    ] = [],  # noqa: B006
    corpus: UsualText = [],  # noqa: B006
    train: EditorSets = [],  # noqa: B006
    editor_steps: EditorSteps = 500,
    batches: Annotated[int, typer.Option(min=1, help="Edit batches.")] = 6,
    edits: Annotated[int, typer.Option(min=1, help="Rows of each.")] = 10,
    seed: Annotated[int, typer.Option(help="Draws the rows.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for sequence.json and, with the extra `plots`, sequence.png.")
    ] = None,
) -> None:
    """Teach methods the same edit batches one after another, and ask after each what it and all before it taught.

    Experts (`found`) and passages (`read`) are looked for among all that was taught. A method survives a batch when its
    F1 over all questions so far is above that of the untouched model, interval and all, and the right tokens of what
    edits must leave alone are at least half as likely as they were; after the first batch that it does not survive it
    is taught no more. Needs no store.
    """
    from knowstore.bench import SequenceConfig, plot_sequence, run_sequence

    session.kept = NOTHING
    make(output)
    if output is not None:
        session.kept = f"what was measured so far, in {output / 'sequence.json'}"
    found: dict[str, Any] = run_sequence(
        data, config=SequenceConfig(batches, edits, seed, n_steps=editor_steps), methods=method, corpus=corpus,
        train=train, models=session.model_config(), on_progress=session.output.progress,
        on_found=None if output is None else lambda some: write(output / "sequence.json", some),
    )  # fmt: skip
    keep(session, output, "sequence", found, lambda path: plot_sequence(found, path))
    if not session.output.is_plain:
        session.output.result(found, "")
        return
    for rows, columns in ((found["rows"], None), (found["methods"], ["method", "survived", "why", "average", "bwt"])):
        columns = columns or list(rows[0])
        session.output.table([{name: cell(row[name]) for name in columns} for row in rows], columns)


@command(bench, example="knowstore bench codecs --data qa.jsonl --limit 100")
def codecs(
    session: Session,
    data: QuestionFiles,
    limit: LimitOfFiles = 200,
    seed: QuestionSeed = 0,
) -> None:
    """Count what each codec takes on disk and what it costs in right answers; needs no store."""
    from knowstore.bench import run_codecs

    session.kept = NOTHING
    found: dict[str, Any] = run_codecs(
        data, models=session.model_config(), limit=limit, seed=seed, on_progress=session.output.progress
    )
    finish(session, found)


@command(bench, example="knowstore bench rerank --data qa.jsonl --corpus passages.jsonl.gz")
def rerank(
    session: Session,
    data: QuestionFile,
    corpus: Corpus,
    limit: Limit = 200,
    candidates: Annotated[int, typer.Option(min=1, help="Passages that are proposed to the reranker.")] = 20,
    seed: QuestionSeed = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for rerank.json and, with the extra `plots`, rerank.png.")
    ] = None,
) -> None:
    """Count how often the right passage comes first in a corpus, before and after the reranker; needs no store."""
    from knowstore.bench import plot_rerank, run_rerank

    session.kept = NOTHING
    make(output)
    found: dict[str, Any] = run_rerank(
        data, corpus, models=session.model_config(), limit=limit, n_candidates=candidates, seed=seed,
        on_progress=session.output.progress,
    )  # fmt: skip
    finish(session, found, output, "rerank", plot_rerank)
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

    session.kept = NOTHING
    found: dict[str, Any] = run_locality(
        data, corpus, models=session.model_config(), limit=limit, seed=seed, on_progress=session.output.progress
    )
    finish(session, found)


@command(bench, example="knowstore bench answers --data qa.jsonl --corpus passages.jsonl.gz")
def answers(
    session: Session,
    data: QuestionFile,
    corpus: Corpus,
    top_k: Annotated[list[int] | None, typer.Option(help="Passages mounted or read; may be repeated.")] = None,
    hybrid: Annotated[bool, typer.Option("--hybrid", help="Both mounted and read as well.")] = False,
    answer_free: Annotated[
        bool, typer.Option("--answer-free", help="Leave out every passage that is right or holds an accepted answer.")
    ] = False,
    limit: Limit = 100,
    seed: QuestionSeed = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for answers.json and, with the extra `plots`, answers.png.")
    ] = None,
) -> None:
    """Score answers whose passages are found in a corpus, with 1 to 8 of them mounted or read; needs no store.

    With `--answer-free` the search fails on purpose: what experts and passages in the prompt do without the answer.
    """
    from knowstore.bench import plot_answers, run_answers

    session.kept = NOTHING
    make(output)
    modes: list[Mode] = ["experts", "rag", "hybrid"] if hybrid else ["experts", "rag"]
    found: dict[str, Any] = run_answers(
        data, corpus, models=session.model_config(), modes=modes, limit=limit, seed=seed, is_answer_free=answer_free,
        on_progress=session.output.progress, **given(top_ks=top_k or None),
    )  # fmt: skip
    finish(session, found, output, "answers", plot_answers)


@command(bench, example="knowstore bench edits --data qa.jsonl --batches 4 --passages 10 --output edits")
def edits(
    session: Session,
    data: QuestionFiles,
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
        Path | None, typer.Option(help="Rows {question or prompt, answers} that no passage is about.")
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

    Interrupted, it goes on where it was when it is run again with the same options and files; with others it refuses.
    """
    from knowstore.bench import EditsConfig, read_unrelated, run_edits

    session.kept = "every edit batch and answer so far; run the same command again to go on"
    config = EditsConfig(
        batches, passages, updates, removals, contradictions, questions, audit_every, sample, final_sample, mode, seed,
        batch_size,
    )  # fmt: skip
    found = run_edits(
        data, output, config=config, corpus=corpus or (), models=session.model_config(),
        on_progress=session.output.progress,
        unrelated=() if unrelated is None else read_unrelated(unrelated, n_unrelated),
    )  # fmt: skip
    session.output.result(found, f"{describe_all(found)}\n{output / 'report.html'}", [output / "report.html"])


@command(bench, example="knowstore bench speed --corpus passages.jsonl.gz")
def speed(
    session: Session,
    corpus: Annotated[Path, typer.Option(help="Passages {title, text} as .jsonl or .jsonl.gz.")],
    limit: Annotated[int, typer.Option(min=24, help="Passages that are ingested.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="How often every way of answering is measured.")] = 5,
    tokens: Annotated[int, typer.Option(min=2, help="Length of each answer.")] = 16,
    top_k: Annotated[str, typer.Option(help="Numbers of passages behind an answer, with commas between.")] = "1,4,8",
    sizes: Annotated[
        str, typer.Option(help="Experts in the banks that are read, with commas between; empty for none.")
    ] = "1000",
    codec: Annotated[Codec, typer.Option(help="How experts are kept.")] = BankConfig.codec,
    seed: Annotated[int, typer.Option(help="Draws the order and the experts that are read.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for speed.json and, with the extra `plots`, speed.png.")
    ] = None,
) -> None:
    """Time experts beside passages in the prompt, both and the bare model, ingest and reads; needs no store.

    Everything is measured in turn in one run, on a store of its own in a temporary folder. A ratio A over B is the
    time of A divided by that of B.
    """
    from knowstore.bench import SpeedConfig, plot_speed, run_speed

    session.kept = NOTHING
    make(output)
    config = SpeedConfig(
        n_passages=limit, ks=numbers(top_k, "--top-k"), rounds=rounds, n_tokens=tokens,
        sizes=numbers(sizes, "--sizes") if sizes else (), codec=codec, seed=seed,
    )  # fmt: skip
    starts = [sys.executable, "-c", f"from {__package__} import main; main()"]
    found: dict[str, Any] = run_speed(
        corpus, models=session.model_config(), config=config, command=starts, on_progress=session.output.progress
    )
    keep(session, output, "speed", found, lambda path: plot_speed(found, path))
    if not session.output.is_plain:
        session.output.result(found, "")
        return
    session.output.table(found["ratios"], ["name", "ratio", "low", "high"], title="Ratios of times")
    for name in ("answers", "reads", "codecs"):
        rows = [{key: cell(value) for key, value in row.items()} for row in found[name]]
        if rows:
            session.output.table(rows, [key for key in rows[0] if not key.endswith("_quartiles")], title=name.title())
    ingest, startup = found["ingest"], found["startup"]
    session.output.note(
        f"Ingest {ingest['passages_per_s']:.1f} passages a second, forwards alone {ingest['forwards_per_s']:.1f}; "
        f"help after {startup['help_s']:.2f} s, first answer after {startup['first_ask_s']:.1f} s"
    )


@command(bench, example="knowstore bench peers --data qa.jsonl --corpus passages.jsonl.gz")
def peers(
    session: Session,
    data: QuestionFile,
    corpus: Corpus,
    limit: Limit = 40,
    passages: Annotated[int, typer.Option(min=1, help="Passages that each system takes in.")] = 1000,
    top_k: Annotated[int, typer.Option(min=1, help="Passages behind an answer.")] = 4,
    seed: Annotated[int, typer.Option(help="Draws questions, passages and the order of everything.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for peers.json and, with the extra `plots`, peers.png.")
    ] = None,
) -> None:
    """Compare with LangChain and LlamaIndex on LanceDB, which the extra `peers` installs; needs no store.

    All have the same retriever and language model, decode in the same way, and run in a process of their own. Prompt
    `own` is a peer's default, `short` that of knowstore. A ratio A over B is the time of A divided by that of B.
    """
    from knowstore.bench import PeersConfig, plot_peers, run_peers

    session.kept = NOTHING
    make(output)
    config = PeersConfig(limit=limit, n_passages=passages, top_k=top_k, seed=seed)
    found: dict[str, Any] = run_peers(
        data, corpus, models=session.model_config(), config=config, on_progress=session.output.progress
    )
    keep(session, output, "peers", found, lambda path: plot_peers(found, path))
    if not session.output.is_plain:
        session.output.result(found, "")
        return
    for name, title in (("rows", "Answers"), ("ingest", "Ingest"), ("ratios", "Ratios of times")):
        rows = [{key: cell(value) for key, value in row.items()} for row in found[name]]
        session.output.table(rows, [key for key in rows[0] if not key.endswith("_quartiles")], title=title)
    session.output.note(f"{found['questions']} questions among {found['passages']:,} passages")


@command(bench, example="knowstore bench ask --questions qa.jsonl --limit 50")
def ask(
    session: Session,
    questions: Annotated[Path, typer.Option(help="Rows with a question, as .jsonl or .jsonl.gz.")],
    limit: Limit = 100,
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
