"""`knowstore ask`: a question answered with mounted experts."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowstore.config import Grain, Index, Search, Where
from knowstore.errors import KnowledgeStoreError, SourceError
from knowstore.records import Mode

from .engine import AddressOption, EngineOption, WorkersOption, ray_config
from .output import Output, shortened
from .registration import app, command
from .session import Session, given, is_terminal, source_of

if TYPE_CHECKING:
    from knowstore import Answer, Filters, KnowledgeStore


@command(app, example='knowstore ask "When was Rome founded?" --explain')
def ask(
    session: Session,
    question: Annotated[str | None, typer.Argument(help="Without one, questions are read line by line.")] = None,
    questions: Annotated[
        Path | None, typer.Option(help="File with a question a line, or rows with one in .jsonl or .jsonl.gz.")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Mount experts, put passages in the prompt, or both.")] = "experts",
    top_k: Annotated[int | None, typer.Option(help="Passages that are kept.")] = None,
    n_read: Annotated[
        int | None, typer.Option(min=1, help="Of these, how many `--mode hybrid` puts in the prompt; 1 by default.")
    ] = None,
    candidates: Annotated[int | None, typer.Option(help="Passages that are proposed to the reranker.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the softmax over reranker scores.")] = None,
    null_threshold: Annotated[
        float | None, typer.Option(help="Mount nothing when no passage scores at least this.")
    ] = None,
    no_null: Annotated[bool, typer.Option("--no-null", help="Always mount the best passages.")] = False,
    grain: Annotated[Grain | None, typer.Option(help="What of a passage is weighed by itself.")] = None,
    search: Annotated[Search | None, typer.Option(help="How passages are proposed.")] = None,
    index: Annotated[Index | None, typer.Option(help="What the vectors are searched with.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Only passages of this source, a path or a name; PREFIX* is a prefix.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Only passages of this title; PREFIX* is a prefix.")] = None,
    batch: Annotated[int | None, typer.Option(help="Only passages of this edit batch.")] = None,
    date_from: Annotated[str | None, typer.Option("--from", help="Only passages dated then or later.")] = None,
    date_to: Annotated[str | None, typer.Option("--to", help="Only passages dated then or earlier.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw the answer instead of taking the likeliest.")] = False,
    beams: Annotated[int | None, typer.Option(help="Beams of beam search.")] = None,
    where: Annotated[Where | None, typer.Option(help="Experts see the whole prompt, or the question onward.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show passages, scores, weights and timings.")] = False,
    untrained: Annotated[bool, typer.Option("--untrained", help="Allow a hypernetwork that nobody trained.")] = False,
    engine: EngineOption = "here",
    workers: WorkersOption = None,
    ray_address: AddressOption = None,
) -> None:
    """Answer a question from the store.

    Without a question a prompt opens: an empty line or Ctrl-D leaves it. When stdin is not a terminal each of
    its lines is a question, answered before the next is read. The questions of a file are answered together, which is
    faster, by workers with --engine ray. With several questions --json writes one object a line.
    """
    from knowstore import Filters, GenerationConfig, RetrievalConfig

    if no_null and null_threshold is not None:
        raise typer.BadParameter("cannot be given together with --null-threshold", param_hint="--no-null")
    if question is not None and questions is not None:
        raise typer.BadParameter("cannot be given together with a question", param_hint="--questions")
    ray = ray_config(engine, workers, ray_address)
    if ray is not None and questions is None:
        raise typer.BadParameter("workers answer the questions of a file (--questions)", param_hint="--engine")
    retrieval = given(
        top_k=top_k, n_read=n_read, n_candidates=candidates, temperature=temperature, search=search, index=index,
        null_threshold=null_threshold, grain=grain,
    )  # fmt: skip
    if no_null:
        retrieval["null_threshold"] = None
    generation = given(max_tokens=max_tokens, do_sample=sample or None, n_beams=beams, where=where)
    session.kept = "the store, which a question never changes"
    with session.open(
        retrieval=RetrievalConfig(**retrieval), generation=GenerationConfig(**generation), allow_untrained=untrained
    ) as store:
        named = None if source is None else source_of(store, source)
        filters = Filters(source=named, title=title, batch_id=batch, date_from=date_from, date_to=date_to)
        if note := store.weights_note():
            session.output.hint(note)
        if question is not None:
            _answer(session.output, store, question, mode, filters, explain)
        elif questions is not None:
            asked = _read(questions)
            for answer in store.ask_many(asked, mode=mode, filters=filters, has_details=explain, ray=ray):
                _show(session.output, answer, explain)
        elif is_terminal():
            _prompt_loop(session.output, store, mode, filters, explain)
        else:
            if isinstance(sys.stdin, TextIOWrapper):
                sys.stdin.reconfigure(errors="replace")  # a question is read as what is ingested is
            for line in sys.stdin:
                if line.strip():
                    _answer(session.output, store, line.strip(), mode, filters, explain)


def _prompt_loop(output: Output, store: KnowledgeStore, mode: Mode, filters: Filters, explain: bool) -> None:
    while question := output.ask_line("Question: "):
        try:
            _answer(output, store, question, mode, filters, explain)
        except KnowledgeStoreError as error:  # a question that fails does not end the conversation
            output.error(error)


def _read(path: Path) -> list[str]:
    """The questions of a file, blank lines left out."""
    if path.suffix in (".jsonl", ".gz"):
        from knowstore.training import read_rows

        found = [row["question"] for row in read_rows(path) if isinstance(row.get("question"), str)]
    else:
        try:
            found = path.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(
                f"{path} cannot be read: {error}", kept="nothing was asked", fix="give a text file in UTF-8"
            ) from error
    return [line.strip() for line in found if line.strip()]


def _answer(output: Output, store: KnowledgeStore, question: str, mode: Mode, filters: Filters, explain: bool) -> None:
    streamed = output.streams
    answer = store.ask(question, mode=mode, filters=filters, on_text=output.stream if streamed else None)
    if streamed:
        output.stream("\n")
    _show(output, answer, explain, streamed=streamed)


def _show(output: Output, answer: Answer, explain: bool, *, streamed: bool = False) -> None:
    output.result(record(answer, explain=explain), "" if streamed else answer.text, [answer.text])
    if output.is_plain:
        for note in [_provenance(answer), *answer.notes]:
            output.note(note)
        if explain:
            _explain(output, answer)


def _provenance(answer: Answer) -> str:
    if answer.is_null:
        return "No passage was good enough; the model answered without any."
    names = ", ".join(
        f"{shortened(one.title or one.text, 40)} ({one.weight:.2f}, batch {one.batch_id})" for one in answer.experts
    )
    return f"From: {names}" if names else ""


def record(answer: Answer, *, explain: bool = False) -> dict[str, Any]:
    """An answer as `--json` writes it."""
    names = ["passage_id", "weight", "score", "batch_id", "source", "title"]
    names += ["text", "segment_weights", "word_weights"] if explain else []
    shown: dict[str, Any] = {
        "question": answer.question,
        "answer": answer.text,
        "mode": answer.mode,
        "is_null": answer.is_null,
        "n_read": answer.n_read,
        "experts": [{name: getattr(expert, name) for name in names} for expert in answer.experts],
        "timings_s": answer.timings_s,
        "notes": answer.notes,
    }
    if explain:
        names = ["passage_id", "title", "source", "date", "batch_id", "retrieval_score", "score", "segment_scores"]
        shown["hits"] = [{name: getattr(hit, name) for name in names} for hit in answer.hits]
    return shown


def _explain(output: Output, answer: Answer) -> None:
    weights = {expert.passage_id: expert for expert in answer.experts}
    passages = []
    for hit in answer.hits:
        expert = weights.get(hit.passage_id)
        passages.append(
            {
                "passage": shortened(f"{hit.title}: {hit.text}" if hit.title else hit.text),
                "retrieval": hit.retrieval_score,
                "rerank": hit.score,
                "weight": expert.weight if expert else None,
                "sentence_weights": " ".join(f"{weight:.2f}" for weight in expert.segment_weights) if expert else None,
                "batch": hit.batch_id,
            }
        )
    columns = ["passage", "retrieval", "rerank", "weight", "sentence_weights", "batch"]
    output.table(passages, columns, title="Passages")
    timings = [{"stage": stage, "seconds": seconds} for stage, seconds in answer.timings_s.items()]
    output.table(timings, ["stage", "seconds"], title="Timings")
