"""`knowstore train`: hypernetworks trained on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Output, size
from .registration import command, group
from .session import Session, given

if TYPE_CHECKING:
    from knowstore.training import TrainingConfig, TrainingProgress

train = group(
    "train",
    "Train what turns passages into experts.",
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
    output: Annotated[Path, typer.Option(help="Folder for the weights; its training/ takes checkpoints and the log.")],
    minutes: Annotated[float | None, typer.Option(help="How long to train.")] = None,
    steps: Annotated[int | None, typer.Option(help="How many steps to train, instead of minutes.")] = None,
    batch_questions: Annotated[int | None, typer.Option(help="Most questions of a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the data and the first weights.")] = None,
    layer: Annotated[int, typer.Option(help="0-based decoder block that the experts are for.")] = 12,
    max_norm: Annotated[float | None, typer.Option(help="Bound on what experts add at a position.")] = 250.0,
) -> None:
    """Train a `tokens` hypernetwork for an LLM: where answers stand, then Eq. 5.

    Its encoder starts from the retriever's. The same command goes on from the last checkpoint of a run that was
    cut off. Use the result with `knowstore --hypernetwork FOLDER`.
    """
    import torch

    from knowstore.encoders import load_base
    from knowstore.experts import TokensConfig, TokensHypernetwork, load_llm
    from knowstore.models import choose_device, choose_dtype, resolve
    from knowstore.sources import sentence_spans
    from knowstore.training import TrainingConfig, load_questions, train_tokens

    work = output / "training"
    session.kept = f"the last checkpoint in {work}"
    rows = load_questions(data, sentence_spans)
    wanted = {"minutes": minutes, "steps": steps, "batch_questions": batch_questions}
    config = TrainingConfig(**given(**wanted, learning_rate=learning_rate, seed=seed))
    config = replace(config, n_held_out=min(config.n_held_out, len(rows.questions) // 10))
    models = session.model_config()
    device = choose_device(models.device)
    resolved = resolve(models.llm, "llm", progress=session.output.progress)
    llm = load_llm(resolved.path, device=device, dtype=choose_dtype(models.dtype, device))
    torch.manual_seed(config.seed)
    base_path = resolve(models.retriever, "retriever", progress=session.output.progress).path
    base = load_base(base_path)
    sizes = TokensConfig(
        width=llm.width, layer=layer, encoder_width=base.width, base_digest=base.digest, max_norm=max_norm
    )
    log = _Log(session.output, config)
    trained = train_tokens(TokensHypernetwork(sizes, base).to(device), llm, rows, config, work, on_progress=log)
    notes = f"{len(rows.questions):,} questions, {log.seconds / 60:.0f} minutes, for {resolved.name}; {log.quality}"
    trained.config = replace(trained.config, trained_steps=log.step, notes=notes)
    trained.save(output, dtype=torch.float16)
    if models.retriever != "default":
        base.save(output / "encoder")
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

    def __init__(self, output: Output, config: TrainingConfig) -> None:
        self._output, self._config = output, config
        self.step, self.seconds, self.loss = 0, 0.0, 0.0
        self.gold: float | None = None
        self.shuffled: float | None = None

    @property
    def quality(self) -> str:
        """How good it is on the questions that were kept out."""
        if self.gold is None or self.shuffled is None:
            return "not validated"
        return (
            f"nats per answer token on questions kept out: {self.gold:.2f} with the passage's expert, "
            f"{self.shuffled:.2f} with another passage's"
        )

    def __call__(self, progress: TrainingProgress) -> None:
        self.step, self.seconds, self.loss = progress.step, progress.seconds, progress.loss
        detail = f"step {progress.step}, {progress.part}, loss {progress.loss:.2f}"
        if progress.held_out_accuracy is not None:
            self.gold, self.shuffled = progress.gold, progress.shuffled
            self._output.note(
                f"{progress.seconds:.0f} s, {detail}; on questions kept out the first token is right within its "
                f"sentence for {progress.held_out_accuracy:.0%}; {self.quality}"
            )
        if self._config.steps is None:
            total = int(60 * self._config.minutes)
            self._output.progress("training (seconds)", min(int(progress.seconds), total), total, detail)
        else:
            self._output.progress("training (steps)", progress.step, self._config.steps, detail)
