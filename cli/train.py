"""`knowstore train`: hypernetworks and rerankers trained on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from knowstore.errors import HypernetworkError

from .output import Output, size
from .registration import command, group
from .session import Session, given

if TYPE_CHECKING:
    from knowstore.training import RerankerProgress, TrainingConfig, TrainingProgress

train = group(
    "train",
    "Train what turns passages into experts, and what orders passages.",
    "knowstore train hypernetwork --data train.jsonl.gz --output my-hypernetwork --minutes 20",
)


@command(train, example="knowstore train hypernetwork --data train.jsonl.gz --output my-hypernetwork --minutes 20")
def hypernetwork(
    session: Session,
    data: Annotated[
        list[Path],
        typer.Option(
            help="QA rows {question, answers, passage: {title, text}} as .jsonl or .jsonl.gz; may be repeated."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for the weights; its training/ takes checkpoints, the log and its curves.")
    ],
    minutes: Annotated[float | None, typer.Option(help="How long to train.")] = None,
    steps: Annotated[int | None, typer.Option(help="How many steps to train, instead of minutes.")] = None,
    batch_questions: Annotated[int | None, typer.Option(help="Most questions of a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the data and the first weights.")] = None,
    layer: Annotated[int, typer.Option(help="0-based decoder block that the experts are for.")] = 12,
    max_norm: Annotated[float | None, typer.Option(help="Bound on what experts add at a position.")] = 250.0,
    pointing_share: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of the run for the keys of `tokens`.")
    ] = None,
    kind: Annotated[Literal["tokens", "pooled"], typer.Option(help="The default's design, or the paper's.")] = "tokens",
    recipe: Annotated[
        Literal["ours", "paper"], typer.Option(help="The paper's is one epoch of Eq. 5, AdamW, cosine from 1e-4.")
    ] = "ours",
    patience: Annotated[
        int | None, typer.Option(min=1, help="End after so many validations without a gain, and keep the best weights.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="A trained hypernetwork to go on from; it brings layer and bound.")
    ] = None,
) -> None:
    """Train a hypernetwork for an LLM: `tokens` on where answers stand, then by Eq. 5; `pooled` by Eq. 5 alone.

    The encoder of `tokens` starts from the retriever's, and its experts are weighed by the reranker, where that reads
    passages without their vectors. The same command goes on from the last checkpoint of a run that was cut off.
    Use the result with `knowstore --hypernetwork FOLDER`.
    """
    import torch

    from knowstore.encoders import load_base
    from knowstore.experts import (
        Hypernetwork,
        PooledConfig,
        PooledHypernetwork,
        TokensConfig,
        TokensHypernetwork,
        load_hypernetwork,
        load_llm,
    )
    from knowstore.models import choose_device, choose_dtype, resolve
    from knowstore.retrieval import JointReranker, load_reranker
    from knowstore.sources import sentence_spans
    from knowstore.training import TrainingConfig, load_questions, train_hypernetwork

    work = output / "training"
    session.kept = f"the last checkpoint in {work}"
    rows = load_questions(data, sentence_spans)
    wanted = {"minutes": minutes, "steps": steps, "batch_questions": batch_questions}
    rates = {"learning_rate": learning_rate, "pointing_share": pointing_share}
    recipes = {"ours": TrainingConfig(), "paper": TrainingConfig.paper()}
    config = replace(recipes[recipe], **given(**wanted, **rates, seed=seed, patience=patience))
    if minutes is not None or steps is not None:
        config = replace(config, epochs=None)
    config = replace(config, n_held_out=min(config.n_held_out, len(rows.questions) // 10))
    models = session.model_config()
    device = choose_device(models.device)
    resolved = resolve(models.llm, "llm", progress=session.output.progress)
    llm = load_llm(resolved.path, device=device, dtype=choose_dtype(models.dtype, device))
    torch.manual_seed(config.seed)
    log = _Log(session.output, config, work)

    def encoder_of(reference: str) -> Path:
        return resolve(reference, "retriever", progress=session.output.progress).path

    network: Hypernetwork
    if start is not None:
        network = load_hypernetwork(resolve(start, "hypernetwork").path, device=device, base=encoder_of)
        if network.config.kind != kind or network.config.width != llm.width:
            raise HypernetworkError(
                f"{start} is a {network.config.kind} hypernetwork for a model of width {network.config.width}",
                kept="nothing was trained",
                fix=f"go on from one of kind `{kind}` for a model of width {llm.width}",
            )
    elif kind == "pooled":
        network = PooledHypernetwork(PooledConfig(llm.width, layer=layer, max_norm=max_norm)).to(device)
    else:
        encoder = resolve(models.retriever, "retriever", progress=session.output.progress)
        base = load_base(encoder.path)
        sizes = TokensConfig(
            width=llm.width,
            layer=layer,
            encoder_width=base.width,
            base=str(encoder.path) if encoder.origin == "directory" else models.retriever,
            base_digest=base.digest,
            max_norm=max_norm,
        )
        network = TokensHypernetwork(sizes, base).to(device)
    assert isinstance(network, TokensHypernetwork | PooledHypernetwork)
    if isinstance(network, TokensHypernetwork):
        network.set_trainable()
    else:
        network.requires_grad_(True)
    reranker = None
    if isinstance(network, TokensHypernetwork):
        found = resolve(models.reranker, "reranker", progress=session.output.progress).path
        loaded = load_reranker(models.reranker, found, device, llm.dtype, base=encoder_of)
        reranker = loaded if isinstance(loaded, JointReranker) else None
        if reranker is None:
            session.output.note("This reranker needs vectors of passages: experts are weighed by random draws instead.")
    train_hypernetwork(
        network, llm, rows, config, work, is_started=start is not None, on_progress=log,
        reranker=reranker,
    )  # fmt: skip
    steps_before = network.config.trained_steps
    notes = f"{len(rows.questions):,} questions, {log.seconds / 60:.0f} minutes, for {resolved.name}; {log.quality}"
    network.config = replace(network.config, trained_steps=steps_before + log.step_kept, notes=notes)
    network.save(output, dtype=torch.float16)
    n_bytes = (output / "model.safetensors").stat().st_size
    record: dict[str, Any] = {
        "output": str(output), "steps": log.step, "seconds": log.seconds, "loss": log.loss,
        "gold_loss": log.gold, "shuffled_loss": log.shuffled, "size_bytes": n_bytes,
    }  # fmt: skip
    session.output.result(
        record, f"{output}: {log.step:,} steps, {log.seconds:.0f} s, {size(n_bytes)}; {log.quality}", [output]
    )
    session.output.hint(f"use it with `knowstore --hypernetwork {output}`; {work} may be deleted")


class _Log:
    """Shows a training run as it goes, and keeps its last figures."""

    def __init__(self, output: Output, config: TrainingConfig, work: Path) -> None:
        self._output, self._config, self._work = output, config, work
        self.step, self.step_kept, self.seconds, self.loss = 0, 0, 0.0, 0.0
        self._best_gain: float | None = None
        self.gold: float | None = None
        self.shuffled: float | None = None
        self.gold_em: float | None = None
        self.shuffled_em: float | None = None

    @property
    def quality(self) -> str:
        """How good it is on the questions that were kept out."""
        if self.gold is None or self.shuffled is None:
            return "not validated"
        return (
            f"nats per answer token on questions kept out: {self.gold:.2f} with the passage's expert, "
            f"{self.shuffled:.2f} with another passage's; exact answers: {self.gold_em or 0:.0%} and "
            f"{self.shuffled_em or 0:.0%}"
        )

    def __call__(self, progress: TrainingProgress) -> None:
        self.step, self.seconds, self.loss = progress.step, progress.seconds, progress.loss
        if self._config.patience is None:
            self.step_kept = progress.step
        detail = f"step {progress.step}, {progress.part}, loss {progress.loss:.2f}"
        if progress.held_out_accuracy is not None or progress.gold is not None:
            gain = (progress.gold_f1 or 0.0) - (progress.shuffled_f1 or 0.0)
            if self._config.patience is None or self._best_gain is None or gain > self._best_gain:
                self._best_gain, self.step_kept = gain, progress.step
                self.gold, self.shuffled = progress.gold, progress.shuffled
                self.gold_em, self.shuffled_em = progress.gold_em, progress.shuffled_em
            accuracy = progress.held_out_accuracy
            pointed = "" if accuracy is None else f"the first token is right within its sentence for {accuracy:.0%}; "
            self._output.note(f"{progress.seconds:.0f} s, {detail}; {pointed}{self.quality}")
            _draw(self._work)
        self._output.progress("training (%)", min(100, int(100 * progress.fraction)), 100, detail)


def _draw(work: Path) -> None:
    """The curves so far in curves.png, where matplotlib is installed."""
    from knowstore.bench import can_plot, plot_training

    if can_plot():
        plot_training(work / "log.jsonl", work / "curves.png")


@command(train, example="knowstore train reranker --data train.jsonl.gz --output my-reranker --minutes 20")
def reranker(
    session: Session,
    data: Annotated[
        list[Path],
        typer.Option(
            help="QA rows {question, answers, passage: {title, text}} as .jsonl or .jsonl.gz; may be repeated."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for the weights; its training/ takes the checkpoint, the log and its curves.")
    ],
    minutes: Annotated[float | None, typer.Option(help="How long to train.")] = None,
    steps: Annotated[int | None, typer.Option(help="How many steps to train, whatever time they take.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions of a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the data and the first weights.")] = None,
    n_negatives: Annotated[int | None, typer.Option(help="Passages that do not answer, for each question.")] = None,
) -> None:
    """Train a reranker by Eq. 8: it reads question and passage together and scores every sentence.

    It starts from the retriever's encoder and finds passages that do not answer with the store's own searches. The
    same command goes on from the last checkpoint of a run that was cut off. Use the result with
    `knowstore --reranker FOLDER`.
    """
    import torch

    from knowstore.encoders import load_base
    from knowstore.models import choose_device, choose_dtype, resolve
    from knowstore.retrieval import JointModel, Retriever
    from knowstore.sources import sentence_spans
    from knowstore.store import passage_search
    from knowstore.training import RerankerTrainingConfig, load_questions, train_reranker

    work = output / "training"
    session.kept = f"the last checkpoint in {work}"
    rows = load_questions(data, sentence_spans)
    chosen = given(minutes=minutes, steps=steps, batch_size=batch_size, seed=seed, n_negatives=n_negatives)
    config = RerankerTrainingConfig(**chosen)
    config = replace(config, n_held_out=min(config.n_held_out, len(rows.questions) // 10))
    models = session.model_config()
    device = choose_device(models.device)
    resolved = resolve(models.retriever, "retriever", progress=session.output.progress)
    base = str(resolved.path) if resolved.origin == "directory" else models.retriever
    torch.manual_seed(config.seed)
    model = JointModel(load_base(resolved.path, n_shared=None)).to(device)
    session.output.progress("encoding passages", 0, len(rows.passages))
    encoder = Retriever.load(resolved.path, device, choose_dtype(models.dtype, device))
    log = _RerankerLog(session.output, config.minutes, config.steps, work)
    with passage_search(encoder, [(one.title, one.text) for one in rows.passages]) as search:
        trained = train_reranker(model, rows, search, config, work, base=base, on_progress=log)
    notes = f"{len(rows.questions):,} questions, {log.seconds / 60:.0f} minutes, from {resolved.name}; {log.quality}"
    trained.config = replace(trained.config, notes=notes)
    trained.save(output)
    n_bytes = (output / "model.safetensors").stat().st_size
    record: dict[str, Any] = {
        "output": str(output), "steps": trained.config.trained_steps, "seconds": log.seconds, "loss": log.loss,
        "sentence_accuracy": log.sentence_accuracy, "gold_first": log.gold_first,
        "null_threshold": trained.null_threshold, "temperature": trained.temperature, "size_bytes": n_bytes,
    }  # fmt: skip
    summary = f"{trained.config.trained_steps:,} steps, {log.seconds:.0f} s, {size(n_bytes)}; {log.quality}"
    session.output.result(record, f"{output}: {summary}", [output])
    session.output.hint(f"use it with `knowstore --reranker {output}`; {work} may be deleted")


class _RerankerLog:
    """Shows the training of a reranker as it goes, and keeps its last figures."""

    def __init__(self, output: Output, minutes: float, steps: int | None, work: Path) -> None:
        self._output, self._minutes, self._steps, self._work = output, minutes, steps, work
        self.seconds, self.loss = 0.0, 0.0
        self.sentence_accuracy: float | None = None
        self.gold_first: float | None = None

    @property
    def quality(self) -> str:
        """How good it is on the questions that were kept out."""
        if self.sentence_accuracy is None or self.gold_first is None:
            return "not validated"
        return (
            f"on questions kept out, the sentence that answers is found in {self.sentence_accuracy:.0%} and its "
            f"passage comes first in {self.gold_first:.0%}"
        )

    def __call__(self, progress: RerankerProgress) -> None:
        self.seconds, self.loss = progress.seconds, progress.loss
        detail = f"step {progress.step}, loss {progress.loss:.2f}"
        if progress.sentence_accuracy is not None:
            self.sentence_accuracy, self.gold_first = progress.sentence_accuracy, progress.gold_first
            self._output.note(f"{progress.seconds:.0f} s, {detail}; {self.quality}")
            _draw(self._work)
        if self._steps is not None:
            self._output.progress("training (steps)", progress.step, self._steps, detail)
        else:
            total = int(60 * self._minutes)
            self._output.progress("training (seconds)", min(int(progress.seconds), total), total, detail)
