"""`knowstore train`: hypernetworks, readers and rerankers trained on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from knowstore.errors import ConfigError, HypernetworkError

from .output import Output, size
from .registration import command, group
from .session import Session, given

if TYPE_CHECKING:
    from knowstore.experts import FrozenLLM, Hypernetwork, ReaderHypernetwork
    from knowstore.retrieval import JointReranker
    from knowstore.training import Ranks, RerankerProgress, TrainingData, TrainingProgress

Data = Annotated[
    list[Path],
    typer.Option(help="QA rows {question, answers, passage: {title, text}} as .jsonl or .jsonl.gz; may be repeated."),
]
Folder = Annotated[
    Path, typer.Option(help="Folder for the weights; its training/ takes the checkpoint, the log and its curves.")
]
Minutes = Annotated[float | None, typer.Option(help="How long to train.")]
Steps = Annotated[int | None, typer.Option(help="How many steps to train, instead of minutes.")]
BatchQuestions = Annotated[int | None, typer.Option(min=1, help="Most questions of a step.")]
LearningRate = Annotated[float | None, typer.Option(help="The highest learning rate.")]
Seed = Annotated[int | None, typer.Option(help="Of the order of the data and the first weights.")]

_UNKNOWN = "not validated"
_LORA_RATE = 2e-4

train = group(
    "train",
    "Train what turns passages into experts, what reads passages in the prompt, and what orders passages.",
    "knowstore train hypernetwork --data train.jsonl.gz --output my-hypernetwork --minutes 20",
)


@command(train, example="knowstore train hypernetwork --data train.jsonl.gz --output my-hypernetwork --minutes 20")
def hypernetwork(
    session: Session,
    data: Data,
    output: Folder,
    minutes: Minutes = None,
    steps: Steps = None,
    batch_questions: BatchQuestions = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    layer: Annotated[int, typer.Option(help="0-based decoder block that the experts are for.")] = 12,
    max_norm: Annotated[float | None, typer.Option(help="Bound on what experts add at a position.")] = 250.0,
    pointing_share: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of the run for the keys of `tokens`.")
    ] = None,
    static_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of the static expert alone, before the rest of answering.")
    ] = None,
    kind: Annotated[Literal["tokens", "pooled"], typer.Option(help="The default's design, or the paper's.")] = "tokens",
    pooled_start: Annotated[
        Literal["paper", "analytic"], typer.Option(help="First weights of `pooled`: drawn, or adding passages' words.")
    ] = "paper",
    recipe: Annotated[
        Literal["ours", "paper"], typer.Option(help="The paper's is one epoch of Eq. 5, AdamW, cosine from 1e-4.")
    ] = "ours",
    patience: Annotated[
        int | None, typer.Option(min=1, help="End after so many validations without a gain, and keep the best weights.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="A trained hypernetwork to go on from; it brings layer and bound.")
    ] = None,
    encoder_from: Annotated[
        str | None,
        typer.Option(help="A trained `tokens` hypernetwork, of any layer or LLM: begin with its encoder."),
    ] = None,
    batches_per_step: Annotated[
        int | None, typer.Option(min=1, help="Batches whose losses a step averages; one for each process.")
    ] = None,
    distil_weight: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of answering as the reader does, passage in its prompt; or 0.")
    ] = None,
    contrast_weight: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of answers being likelier than with another's expert; or 0.")
    ] = None,
    nothing_weight: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of another passage's expert changing nothing; or 0.")
    ] = None,
    completion_weight: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of completing the passage from a few words; or 0.")
    ] = None,
    n_mounted: Annotated[
        int | None, typer.Option(min=2, help="Passages whose experts are mounted together, for `tokens`.")
    ] = None,
    has_hard_negatives: Annotated[
        bool, typer.Option("--hard-negatives", help="Train passages of one title together.")
    ] = False,
) -> None:
    """Train a hypernetwork for an LLM: `tokens` on where answers stand, then by Eq. 5; `pooled` by Eq. 5 alone.

    The encoder of `tokens` starts from the retriever's, and its experts are weighed by the reranker, where that reads
    passages without their vectors. The same command goes on from the last checkpoint of a run that was cut off.
    Use the result with `knowstore --hypernetwork FOLDER`.

    Several processes train together when `torchrun --no-python --nproc-per-node N` starts the command: with a GPU for
    each, or on the CPU.
    """
    import torch

    from knowstore.sources import sentence_spans
    from knowstore.training import TrainingConfig, load_questions, train_hypernetwork

    work = output / "training"
    session.kept = f"the last checkpoint in {work}"
    rows = load_questions(data, sentence_spans)
    wanted = {"minutes": minutes, "steps": steps, "batch_questions": batch_questions, "static_steps": static_steps}
    rates = {"learning_rate": learning_rate, "pointing_share": pointing_share, "batches_per_step": batches_per_step}
    signals = {
        "distil_weight": distil_weight, "contrast_weight": contrast_weight, "nothing_weight": nothing_weight,
        "completion_weight": completion_weight,
    }  # fmt: skip
    together = {"n_mounted": n_mounted, "has_hard_negatives": has_hard_negatives}
    recipes = {"ours": TrainingConfig(), "paper": TrainingConfig.paper()}
    config = replace(
        recipes[recipe],
        **given(**wanted, **rates, **signals, **together, seed=seed, patience=patience, pooled_start=pooled_start),
    )
    if minutes is not None or steps is not None:
        config = replace(config, epochs=None)
    if start is not None and encoder_from is not None:
        raise ConfigError(
            "--from and --encoder-from exclude each other", kept="nothing was trained",
            fix="go on from a trained hypernetwork, or begin a new one with its encoder",
        )  # fmt: skip
    with _together(session) as ranks:
        llm, name, digest = _llm(session)
        read_as = None if encoder_from is None else _trained(session, encoder_from)
        torch.manual_seed(config.seed)
        network = _network(session, llm, start, kind, layer, max_norm, read_as)
        begun_with = {"start": None if start is None else network, "encoder": read_as}
        digests = {part: trained.fingerprint() for part, trained in begun_with.items() if trained is not None}
        reranker = _joint_reranker(session, llm) if kind == "tokens" else None
        kept = train_hypernetwork(
            network, llm, rows, config, work, is_started=start is not None, reranker=reranker,
            teacher=_teacher(session, llm) if config.distil_weight else None, ranks=ranks,
            made_with={"llm": digest} | digests,
            on_progress=lambda one: _show(session, work, one, _quality(one), f"{one.part}, "),
        )  # fmt: skip
    if ranks.is_first:
        _save(session, network, kept, output, f"{len(rows.questions):,} questions, for {name}")
        session.output.hint(f"use it with `knowstore --hypernetwork {output}`; {work} may be deleted")


@command(train, example="knowstore train reader --data train.jsonl.gz --output my-reader --minutes 20")
def reader(
    session: Session,
    data: Data,
    output: Folder,
    minutes: Minutes = None,
    steps: Steps = None,
    batch_questions: BatchQuestions = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    start: Annotated[str | None, typer.Option("--from", help="A trained reader to go on from.")] = None,
) -> None:
    """Train what reads passages in the prompt, for `--mode rag` and `hybrid`, by Eq. 5.

    It starts from the hypernetwork's static and query experts, where it does not go on from another reader. In a share
    of the steps the passages' experts are mounted as well, where the hypernetwork is of kind `tokens` and the reranker
    reads passages without their vectors.
    The same command goes on from the last checkpoint of a run that was cut off. Use the result with
    `knowstore --reader FOLDER`.
    """
    import torch

    from knowstore.experts import ReaderConfig, ReaderHypernetwork, TokensHypernetwork, load_hypernetwork
    from knowstore.models import resolve
    from knowstore.sources import sentence_spans
    from knowstore.training import TrainingConfig, load_questions, train_hypernetwork

    work = output / "training"
    session.kept = f"the last checkpoint in {work}"
    rows = load_questions(data, sentence_spans)
    chosen = given(
        minutes=minutes, steps=steps, batch_questions=batch_questions, learning_rate=learning_rate, seed=seed
    )
    config = replace(TrainingConfig(), **chosen)
    models = session.model_config()
    with _together(session) as ranks:
        llm, name, digest = _llm(session)
        found = resolve(models.hypernetwork, "hypernetwork", progress=session.output.progress)
        beside = load_hypernetwork(found.path, device=str(llm.device), base=_encoder(session))
        _check_fits(models.hypernetwork, beside, llm, beside.config.kind)
        torch.manual_seed(config.seed)
        if start is not None:
            network = _reader(session, llm, start)
            if network.config.layer != beside.config.layer:
                raise HypernetworkError(
                    f"{start} reads beside experts at layer {network.config.layer}, "
                    f"{models.hypernetwork}'s are at layer {beside.config.layer}",
                    kept="nothing was trained", fix="go on from a reader that was trained for these experts",
                )  # fmt: skip
        else:
            sizes = ReaderConfig(width=llm.width, layer=beside.config.layer, n_blocks=llm.n_layers)
            network = ReaderHypernetwork(sizes).to(llm.device)
            network.start_from(beside)
        reranker = _joint_reranker(session, llm)
        kept = train_hypernetwork(
            network, llm, rows, config, work, reranker=reranker, ranks=ranks,
            made_with={"llm": digest, "start": beside.fingerprint() if start is None else network.fingerprint()},
            beside=beside if isinstance(beside, TokensHypernetwork) and reranker is not None else None,
            on_progress=lambda one: _show(session, work, one, _quality(one), f"{one.part}, "),
        )  # fmt: skip
    if ranks.is_first:
        _save(session, network, kept, output, f"{len(rows.questions):,} questions, for {name}")
        session.output.hint(f"use it with `knowstore --reader {output}`; {work} may be deleted")


def _network(
    session: Session, llm: FrozenLLM, start: str | None, kind: str, layer: int, max_norm: float | None,
    encoder_from: Hypernetwork | None,
) -> Hypernetwork:  # fmt: skip
    """The trained hypernetwork `start`, or a new one."""
    from knowstore.experts import new_hypernetwork
    from knowstore.models import resolve

    if start is not None:
        network = _trained(session, start).to(llm.device)
        _check_fits(start, network, llm, kind)
        return network
    encoder = resolve(session.model_config().retriever, "retriever", progress=session.output.progress)
    return new_hypernetwork(
        kind, llm, encoder=encoder.path, reference=encoder.kept_reference, layer=layer, max_norm=max_norm,
        encoder_from=encoder_from,
    )  # fmt: skip


def _trained(session: Session, reference: str) -> Hypernetwork:
    """A trained hypernetwork, on the CPU."""
    from knowstore.experts import load_hypernetwork
    from knowstore.models import resolve

    return load_hypernetwork(resolve(reference, "hypernetwork").path, base=_encoder(session))


@contextmanager
def _together(session: Session) -> Iterator[Ranks]:
    """The processes that `torchrun` started to train together, of which the first alone says anything but errors."""
    from knowstore.models import choose_device
    from knowstore.training import joined_ranks

    with joined_ranks(choose_device(session.model_config().device)) as ranks:
        if not ranks.is_first:
            session.output = Output(is_quiet=True)
            session.output.progress.is_shown = False
        yield ranks


def _teacher(session: Session, llm: FrozenLLM) -> ReaderHypernetwork | None:
    """The configured reader, None for `none`."""
    from knowstore.models import NO_READER

    reference = session.model_config().reader
    return None if reference == NO_READER else _reader(session, llm, reference)


def _reader(session: Session, llm: FrozenLLM, reference: str) -> ReaderHypernetwork:
    """A trained reader, refused when it is not for this language model."""
    from knowstore.experts import ReaderHypernetwork, load_hypernetwork
    from knowstore.models import resolve

    found = resolve(reference, "reader", progress=session.output.progress)
    loaded = load_hypernetwork(found.path, device=str(llm.device), base=_encoder(session))
    _check_fits(reference, loaded, llm, "reader")
    if isinstance(loaded, ReaderHypernetwork) and loaded.config.n_blocks == llm.n_layers:
        return loaded
    raise HypernetworkError(
        f"{reference} is no reader for a model of {llm.n_layers} layers",
        kept="nothing was trained", fix="name one with `--reader`, trained by `knowstore train reader` for this model",
    )  # fmt: skip


def _llm(session: Session) -> tuple[FrozenLLM, str, str]:
    """The configured language model, its name, and the digest of its files."""
    from knowstore.experts import load_llm
    from knowstore.models import choose_device, choose_dtype, directory_fingerprint, resolve

    models = session.model_config()
    device = choose_device(models.device)
    resolved = resolve(models.llm, "llm", progress=session.output.progress)
    llm = load_llm(resolved.path, device=device, dtype=choose_dtype(models.dtype, device))
    return llm, resolved.name, directory_fingerprint(resolved.path)


def _check_fits(reference: str, network: Hypernetwork, llm: FrozenLLM, kind: str) -> None:
    """Refuse a hypernetwork of another kind, or for another language model."""
    config = network.config
    if config.kind != kind or config.width != llm.width or config.layer >= llm.n_layers:
        raise HypernetworkError(
            f"{reference} is a {config.kind} hypernetwork for layer {config.layer} of a model of width {config.width}",
            kept="nothing was trained",
            fix=f"start from one of kind `{kind}` for a model of width {llm.width} with {llm.n_layers} layers",
        )


def _encoder(session: Session) -> Callable[[str], Path]:
    """What gives the directory of a published encoder by its reference."""
    from knowstore.models import resolve

    return lambda reference: resolve(reference, "retriever", progress=session.output.progress).path


def _joint_reranker(session: Session, llm: FrozenLLM) -> JointReranker | None:
    """The configured reranker, where it reads passages without their vectors."""
    from knowstore.models import directory_fingerprint, resolve
    from knowstore.retrieval import JointReranker, load_reranker

    reference = session.model_config().reranker
    found = resolve(reference, "reranker", progress=session.output.progress).path
    fingerprint = directory_fingerprint(found) if (found / "config.json").is_file() else ""
    loaded = load_reranker(
        reference, found, str(llm.device), llm.dtype, base=_encoder(session), weights_fingerprint=fingerprint
    )
    if isinstance(loaded, JointReranker):
        return loaded
    session.output.note("This reranker needs vectors of passages, so it weighs nothing in training.")
    return None


def _save(session: Session, network: Hypernetwork, kept: TrainingProgress, output: Path, trained_on: str) -> None:
    """Write what was trained, and say so."""
    import torch

    quality = _quality(kept)
    notes = f"{trained_on}, {kept.seconds / 60:.0f} minutes; {quality}"
    network.config = replace(network.config, trained_steps=network.config.trained_steps + kept.step, notes=notes)
    network.save(output, dtype=torch.float16)
    n_bytes = (output / "model.safetensors").stat().st_size
    record: dict[str, Any] = {
        "output": str(output), "steps": kept.step, "seconds": kept.seconds, "loss": kept.loss,
        "gold_loss": kept.gold, "shuffled_loss": kept.shuffled, "size_bytes": n_bytes,
    }  # fmt: skip
    summary = f"{kept.step:,} steps, {kept.seconds:.0f} s, {size(n_bytes)}; {quality}"
    session.output.result(record, f"{output}: {summary}", [output])


def _quality(progress: TrainingProgress) -> str:
    """How good it is on the questions that were kept out."""
    parts = []
    if progress.held_out_accuracy is not None:
        parts.append(f"the first token is right within its sentence for {progress.held_out_accuracy:.0%}")
    if progress.gold is not None and progress.shuffled is not None:
        parts.append(
            f"nats per answer token {progress.gold:.2f} with the right passage, {progress.shuffled:.2f} with another"
        )
    if progress.gold_em is not None and progress.shuffled_em is not None:
        parts.append(f"exact answers {progress.gold_em:.0%} and {progress.shuffled_em:.0%}")
    return f"on questions kept out: {'; '.join(parts)}" if parts else _UNKNOWN


def _show(
    session: Session, work: Path, progress: TrainingProgress | RerankerProgress, quality: str, part: str = ""
) -> None:
    """Show a training run as it goes."""
    detail = f"step {progress.step}, {part}loss {progress.loss:.2f}"
    if quality != _UNKNOWN:
        session.output.note(f"{progress.seconds:.0f} s, {detail}; {quality}")
        _draw(work)
    session.output.progress("training (%)", min(100, int(100 * progress.fraction)), 100, detail)


def _draw(work: Path) -> None:
    """The curves so far in curves.png, where matplotlib is installed."""
    from knowstore.bench import can_plot, plot_training

    if can_plot():
        plot_training(work / "log.jsonl", work / "curves.png")


@command(train, example="knowstore train reranker --data train.jsonl.gz --output my-reranker --minutes 20")
def reranker(
    session: Session,
    data: Data,
    output: Folder,
    minutes: Minutes = None,
    steps: Steps = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions of a step.")] = None,
    seed: Seed = None,
    n_negatives: Annotated[
        int | None, typer.Option(min=0, help="Passages that do not answer, for each question.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="A reranker to fine-tune: a directory or a hub id of the BGE family or alike.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="With --base: rank of the updates to its linear layers; else all weights.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="With --base: the highest learning rate.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="A reranker that was trained without --base, to go on from.")
    ] = None,
    n_shared: Annotated[
        int | None,
        typer.Option(min=0, help="The first layers that stay as the retriever's; by default half, or as --from's."),
    ] = None,
    dropout: Annotated[float | None, typer.Option(min=0, max=0.9, help="Of the encoder, while it is trained.")] = None,
) -> None:
    """Train a reranker by Eq. 8: it reads question and passage together and scores every sentence.

    It starts from the retriever's encoder and finds passages that do not answer with the store's own searches. With
    `--base` a published reranker is fine-tuned instead: a sequence classifier with one label such as
    `BAAI/bge-reranker-base`, or a causal language model that says Yes such as `BAAI/bge-reranker-v2-gemma`. The same
    command goes on from the last checkpoint of a run that was cut off. Use the result with
    `knowstore --reranker FOLDER`.
    """
    own = {"--from": start, "--n-shared": n_shared, "--dropout": dropout}
    if base is not None and any(value is not None for value in own.values()):
        raise typer.BadParameter(
            "goes without --base", param_hint=next(name for name, value in own.items() if value is not None)
        )
    if base is not None:
        chosen = given(minutes=minutes, steps=steps, batch_size=batch_size, seed=seed, n_negatives=n_negatives)
        _fine_tune(session, data, output, base, lora_rank, chosen | given(learning_rate=learning_rate))
        return
    if lora_rank is not None or learning_rate is not None:
        raise typer.BadParameter("goes with --base", param_hint="--lora-rank or --learning-rate")
    import torch

    from knowstore.encoders import load_base
    from knowstore.models import choose_device, choose_dtype, resolve
    from knowstore.retrieval import JointModel, load_joint
    from knowstore.sources import sentence_spans
    from knowstore.training import RerankerTrainingConfig, load_questions, train_reranker

    work = output / "training"
    session.kept = f"the last checkpoint in {work}"
    rows = load_questions(data, sentence_spans)
    chosen = given(minutes=minutes, steps=steps, batch_size=batch_size, seed=seed, n_negatives=n_negatives)
    config = RerankerTrainingConfig(**chosen | given(dropout=dropout))
    models = session.model_config()
    device = choose_device(models.device)
    resolved = resolve(models.retriever, "retriever", progress=session.output.progress)
    torch.manual_seed(config.seed)
    if start is None:
        model, begun = JointModel(load_base(resolved.path, n_shared=n_shared)), None
    else:
        model, begun = load_joint(resolve(start, "reranker").path, resolved.path)
        if n_shared is not None:
            model.share(n_shared)
    model.to(device)
    with ExitStack() as stack:
        search = None
        if config.n_negatives:
            search = stack.enter_context(_search(session, rows))
        trained, kept = train_reranker(
            model, rows, search, config, work, base=resolved.kept_reference, start=begun,
            dtype=choose_dtype(models.dtype, device),
            on_progress=lambda one: _show(session, work, one, _reranker_quality(one)),
        )  # fmt: skip
    quality = _reranker_quality(kept)
    notes = f"{len(rows.questions):,} questions, {kept.seconds / 60:.0f} minutes, from {resolved.name}; {quality}"
    trained.config = replace(trained.config, notes=notes)
    trained.save(output)
    n_bytes = (output / "model.safetensors").stat().st_size
    record: dict[str, Any] = {
        "output": str(output), "steps": kept.step, "seconds": kept.seconds, "loss": kept.loss,
        "sentence_accuracy": kept.sentence_accuracy, "gold_first": kept.gold_first,
        "null_threshold": trained.null_threshold, "temperature": trained.config.temperature, "size_bytes": n_bytes,
    }  # fmt: skip
    summary = f"{kept.step:,} steps, {kept.seconds:.0f} s, {size(n_bytes)}; {quality}"
    session.output.result(record, f"{output}: {summary}", [output])
    session.output.hint(f"use it with `knowstore --reranker {output}`; {work} may be deleted")


def _fine_tune(
    session: Session, data: list[Path], output: Path, base: str, lora_rank: int | None, chosen: dict[str, Any]
) -> None:
    """Fine-tune a published reranker of pairs."""
    import torch

    from knowstore.models import choose_device, choose_dtype, directory_fingerprint, resolve
    from knowstore.retrieval import load_pairs
    from knowstore.sources import sentence_spans
    from knowstore.training import PairTrainingConfig, load_questions, train_pairs

    work = output / "training"
    session.kept = f"the last checkpoint in {work}"
    rows = load_questions(data, sentence_spans)
    config = PairTrainingConfig(**({"learning_rate": _LORA_RATE} if lora_rank else {}) | chosen)
    models = session.model_config()
    device = choose_device(models.device)
    resolved = resolve(base, "reranker", progress=session.output.progress)
    torch.manual_seed(config.seed)
    model = load_pairs(resolved.path, device)
    if lora_rank is not None:
        model.use_lora(lora_rank)
    with _search(session, rows) as search:
        kept = train_pairs(
            model, rows, search, config, work, base_digest=directory_fingerprint(resolved.path),
            is_bfloat16=choose_dtype(models.dtype, device) == torch.bfloat16,
            on_progress=lambda one: _show(session, work, one, _reranker_quality(one)),
        )  # fmt: skip
    model.save(output)
    n_bytes = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    record: dict[str, Any] = {
        "output": str(output), "steps": kept.step, "seconds": kept.seconds, "loss": kept.loss,
        "sentence_accuracy": None, "gold_first": kept.gold_first,
        "null_threshold": None, "temperature": None, "size_bytes": n_bytes,
    }  # fmt: skip
    summary = f"{kept.step:,} steps, {kept.seconds:.0f} s, {size(n_bytes)}; {_reranker_quality(kept)}"
    session.output.result(record, f"{output}: {summary}", [output])
    session.output.hint(f"use it with `knowstore --reranker {output}`; {work} may be deleted")


@contextmanager
def _search(session: Session, rows: TrainingData) -> Iterator[Callable[[str], list[int]]]:
    """What finds the passages of the questions, for hard negatives."""
    from knowstore.models import choose_device, choose_dtype, resolve
    from knowstore.retrieval import Retriever
    from knowstore.store import passage_search

    models = session.model_config()
    device = choose_device(models.device)
    found = resolve(models.retriever, "retriever", progress=session.output.progress)
    encoder = Retriever.load(found.path, device, choose_dtype(models.dtype, device))
    texts = [(one.title, one.text) for one in rows.passages]
    with passage_search(encoder, texts, session.output.progress) as search:
        yield search


def _reranker_quality(progress: RerankerProgress) -> str:
    """How good it is on the questions that were kept out."""
    parts = []
    if progress.sentence_accuracy is not None:
        parts.append(f"the sentence that answers is found in {progress.sentence_accuracy:.0%}")
    if progress.gold_first is not None:
        parts.append(f"its passage comes first in {progress.gold_first:.0%}")
    return f"on questions kept out, {' and '.join(parts)}" if parts else _UNKNOWN
