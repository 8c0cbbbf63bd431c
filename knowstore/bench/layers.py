"""Where experts are mounted (the paper's Figure 3): a hypernetwork is trained for each of several layers, all alike,
and the answers with the right passage's expert are compared with those with another's."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from knowstore._loaded import LoadedModels, OnProgress
from knowstore.bench.controls import read_cases
from knowstore.bench.resuming import keep_run
from knowstore.bench.trained import Rows, digest_of, gains, keep_scores, kept_scores, percent_shown
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError
from knowstore.models import NO_READER, directory_fingerprint, resolve
from knowstore.sources import sentence_spans
from knowstore.training import TrainingConfig, load_questions, train_hypernetwork

if TYPE_CHECKING:
    from knowstore.training import TrainingData


@dataclass(frozen=True)
class LayersConfig:
    """Which 0-based `layers` are compared, with hypernetworks of which `kind`, each trained by `training` from the same
    seed and scored on up to `limit` questions of each file, drawn with `seed`; answers have up to `max_tokens`. With
    `encoder_from`, the name or folder of a trained hypernetwork, each begins with a copy of its encoder and has but to
    learn where the layer's states tell what is asked, and what to add to them."""

    layers: tuple[int, ...]
    kind: Literal["tokens", "pooled"] = "tokens"
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(minutes=20.0))
    limit: int = 100
    seed: int = 0
    max_tokens: int = 32
    encoder_from: str | None = None


def run_layers(
    train: Sequence[Path],
    data: Sequence[Path],
    output: Path,
    *,
    config: LayersConfig,
    models: ModelConfig | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, object]:
    """Train a hypernetwork for each layer and score its experts, gold against shuffled.

    Cut off, the same call goes on: layers that were scored are not trained again, and the one that was being trained
    goes on from its last checkpoint. `settings.json` in `output` says which call.

    Args:
        train: QA files to train on.
        data: QA files that are asked.
        output: folder for `layer-N/` with the hypernetwork and its scores, and for `layers.json`.
        config: what is compared.
        models: the other models; `hypernetwork` and `reader` of it make no difference.

    Returns: `rows` of {layer, data, n, steps, gold_em, shuffled_em, em_gain, and the same of f1}, each score with its
        bootstrap 95 % interval under `_ci`: gains are gold minus shuffled on the same questions. And `seconds`, of this
        call, and `config`.

    Raises:
        ConfigError: no layers, or such as the LLM does not have, `output` holds a run of other settings, models or
            files, or fewer than two questions.
        HypernetworkError: an `encoder_from` that cannot be taken over.
        TrainingError: a file that cannot be read, or a run that fails.
    """
    started = time.perf_counter()
    models = replace(models or ModelConfig(), reader=NO_READER)
    described = asdict(config)
    settings = described | asdict(replace(models, hypernetwork=""))
    if config.encoder_from is not None:
        found_in = resolve(config.encoder_from, "hypernetwork").path
        settings["encoder_from"] = directory_fingerprint(found_in)
    keep_run(output / "settings.json", settings, digest_of([*train, *data]), is_begun=any(output.glob("layer-*")))
    for path in data:
        read_cases(path, config.limit, config.seed)  # refused now, not when a layer was trained
    loaded = LoadedModels(models, on_progress=on_progress)
    _check(config.layers, loaded)
    rows: Rows = []
    questions: TrainingData | None = None
    for place, layer in enumerate(config.layers):
        folder = output / f"layer-{layer}"
        if on_progress is not None:
            on_progress(f"layer {layer}", place, len(config.layers))
        scores = kept_scores(folder)
        if scores is None:
            questions = questions or load_questions(train, sentence_spans)
            steps = _train(layer, questions, folder, config, loaded)
            found = gains(folder, data, models, config.limit, config.seed, config.max_tokens, on_progress)
            scores = keep_scores(folder, [{"layer": layer, "steps": steps} | row for row, _ in found])
        rows += scores
    result = {"rows": rows, "config": described, "seconds": time.perf_counter() - started}
    (output / "layers.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return result


def _check(layers: Sequence[int], loaded: LoadedModels) -> None:
    """Refuse layers that cannot be compared before any is trained."""
    n = loaded.llm.n_layers
    if not layers or len(set(layers)) < len(layers) or not all(0 <= layer < n for layer in layers):
        raise ConfigError(
            f"layers {list(layers)} of a model of {n} layers cannot be compared", kept="nothing was measured",
            fix=f"name one or more different layers from 0 to {n - 1}",
        )  # fmt: skip


def _train(layer: int, questions: TrainingData, folder: Path, config: LayersConfig, loaded: LoadedModels) -> int:
    """A hypernetwork for a layer in `folder`; gives its steps."""
    import torch

    from knowstore.experts import load_hypernetwork, new_hypernetwork
    from knowstore.retrieval import JointReranker

    on_progress = loaded.on_progress
    encoder = resolve(loaded.config.retriever, "retriever", progress=on_progress)
    read_as = None
    if config.encoder_from is not None:
        read_as = load_hypernetwork(resolve(config.encoder_from, "hypernetwork").path, base=lambda _: encoder.path)
    torch.manual_seed(config.training.seed)
    network = new_hypernetwork(
        config.kind, loaded.llm, layer=layer, encoder=encoder.path, reference=encoder.kept_reference,
        encoder_from=read_as,
    )  # fmt: skip
    reranker = loaded.reranker if config.kind == "tokens" else None
    kept = train_hypernetwork(
        network, loaded.llm, questions, config.training, folder / "training",
        reranker=reranker if isinstance(reranker, JointReranker) else None,
        on_progress=percent_shown(f"training for layer {layer}", on_progress),
    )  # fmt: skip
    network.config = replace(network.config, trained_steps=kept.step)
    network.save(folder)
    return kept.step
