"""`knowstore bench layers`, `ablation` and `ceiling`: where experts stand, what makes them, what they could carry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .bench import NOTHING, QuestionFiles, bench
from .measured import draw, finish, make, numbers
from .registration import command
from .session import Session, given

_LAYERS = (4, 8, 12, 16, 20)

AskedFiles = Annotated[list[Path], typer.Option(help="QA rows that are asked, of other passages; may be repeated.")]


@command(bench, example="knowstore bench layers --train train.jsonl.gz --data qa.jsonl --output layers")
def layers(
    session: Session,
    train: Annotated[
        list[Path],
        typer.Option(help="QA rows {question, answers, passage: {title, text}} to train on; may be repeated."),
    ],
    data: AskedFiles,
    output: Annotated[
        Path, typer.Option(help="Folder for the hypernetworks, layers.json and, with the extra `plots`, layers.png.")
    ],
    layer: Annotated[
        list[int] | None, typer.Option(help="A 0-based decoder block; may be repeated. 4, 8, 12, 16, 20 if not given.")
    ] = None,
    kind: Annotated[Literal["tokens", "pooled"], typer.Option(help="The default's design, or the paper's.")] = "tokens",
    minutes: Annotated[float, typer.Option(help="How long to train for each layer.")] = 20.0,
    steps: Annotated[int | None, typer.Option(min=1, help="How many steps for each, instead of minutes.")] = None,
    limit: Annotated[int, typer.Option(min=2, help="Questions of each file that are asked.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the first weights, the order of training, and the questions.")] = 0,
    encoder_from: Annotated[
        str | None, typer.Option(help="A trained `tokens` hypernetwork whose encoder each begins with.")
    ] = None,
) -> None:
    """Train a hypernetwork for each of several layers, and compare what their experts carry (the paper's Figure 3).

    A row's gains are the right passage's expert minus another's. Interrupted, it goes on where it was when it is run
    again with the same options and files; with others it refuses.
    """
    from knowstore.bench import LayersConfig, plot_layers, run_layers
    from knowstore.training import TrainingConfig

    session.kept = "every layer that was trained; run the same command again to go on"
    training = TrainingConfig(minutes=minutes, steps=steps, seed=seed)
    config = LayersConfig(tuple(layer or _LAYERS), kind, training, limit, seed, encoder_from=encoder_from)
    found: dict[str, Any] = run_layers(
        train, data, output, config=config, models=session.model_config(), on_progress=session.output.progress
    )
    draw(session, output / "layers.png", lambda path: plot_layers(found["rows"], path))
    finish(session, found)


@command(
    bench, example="knowstore bench ablation --train train.jsonl.gz --data qa.jsonl --output ablation --minutes 10"
)
def ablation(
    session: Session,
    data: AskedFiles,
    output: Annotated[
        Path,
        typer.Option(help="Folder for the hypernetworks, ablation.json and, with the extra `plots`, ablation.png."),
    ],
    train: Annotated[
        list[Path] | None, typer.Option(help="QA rows to train on; may be repeated. Not needed with 0 minutes.")
    ] = None,
    start: Annotated[
        str, typer.Option("--from", help="A trained `tokens` hypernetwork that each begins with.")
    ] = "default",
    variant: Annotated[
        list[str] | None,
        typer.Option(help="What is changed, as `completion` or `no-query`; may be repeated. `whole` changes nothing."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="How long to train each; 0 leaves all as they are.")] = 10.0,
    steps: Annotated[int | None, typer.Option(min=1, help="How many steps for each, instead of minutes.")] = None,
    limit: Annotated[int, typer.Option(min=2, help="Questions of each file that are asked.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the order of training, and the questions.")] = 0,
) -> None:
    """Train a hypernetwork on with one signal more or one part less, and compare what its experts carry.

    Changes are the right passage's experts against the first variant's. Signals are `no-pointing`, `completion`,
    `contrast`, `nothing`, `distil`, `mounted-4` and `hard-negatives`; parts `no-code`, `no-word`, `no-before`,
    `no-value-code`, `no-query`, `no-static`, `half-values` and `double-values`; without `--variant` each is tried, with
    0 minutes each part.
    Interrupted, it goes on where it was when it is run again with the same options and files.
    """
    from knowstore.bench import SIGNALS, VARIANTS, AblationConfig, plot_ablation, run_ablation
    from knowstore.training import TrainingConfig

    session.kept = "every variant that was trained; run the same command again to go on"
    training = TrainingConfig(minutes=minutes, steps=steps, seed=seed, pointing_share=0.0, static_steps=0)
    config = AblationConfig(start, VARIANTS, training, limit, seed)
    every = [name for name in VARIANTS if config.is_trained or name not in SIGNALS]
    config = replace(config, variants=tuple(variant or every))
    found: dict[str, Any] = run_ablation(
        train or [], data, output, config=config, models=session.model_config(), on_progress=session.output.progress
    )
    draw(session, output / "ablation.png", lambda path: plot_ablation(found["rows"], path))
    finish(session, found)


@command(bench, example="knowstore bench ceiling --data qa.jsonl --layers 12 --layers 12,16,20")
def ceiling(
    session: Session,
    data: QuestionFiles,
    layers: Annotated[
        list[str] | None,
        typer.Option(help="0-based decoder blocks that get an expert each, as 12,16,20; may be repeated."),
    ] = None,
    activation: Annotated[
        Literal["relu", "softmax"] | None, typer.Option(help="Of the experts' neurons. Both if not given.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Passages of each file.")] = 40,
    n_questions: Annotated[int, typer.Option(min=2, help="Questions of each passage, one of which is asked.")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="Neurons of an expert that starts from nothing.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps of gradient descent for each passage, at most.")] = 60,
    seed: Annotated[int, typer.Option(help="Draws passages, their questions and first weights.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for ceiling.json and, with the extra `plots`, ceiling.png.")
    ] = None,
) -> None:
    """Train experts of single passages by gradient, on their questions without the one that is asked or on all.

    What experts could carry beside any blocks, with a ReLU or a softmax, next to what the hypernetwork's do.
    """
    from knowstore.bench import CeilingConfig, plot_ceiling, run_ceiling

    session.kept = NOTHING
    make(output)
    sets = [numbers(some, "--layers", least=0) for some in layers or []]
    config = CeilingConfig(
        limit=limit, n_questions=n_questions, rank=rank, steps=steps, seed=seed,
        **given(layers=tuple(sets) or None, activations=None if activation is None else (activation,)),
    )  # fmt: skip
    found: dict[str, Any] = run_ceiling(
        data, config=config, models=session.model_config(), on_progress=session.output.progress
    )
    finish(session, found, output, "ceiling", plot_ceiling)
