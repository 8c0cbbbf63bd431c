"""What each part of a `tokens` hypernetwork and each signal of its training is for: the same trained hypernetwork goes
on with one of them changed, and the answers with its experts are compared."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowstore._loaded import LoadedModels, OnProgress
from knowstore.bench.controls import read_cases
from knowstore.bench.resuming import keep_run
from knowstore.bench.scoring import share
from knowstore.bench.trained import Rows, digest_of, gains, keep_scores, kept_scores, percent_shown
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError
from knowstore.models import NO_READER
from knowstore.sources import sentence_spans
from knowstore.training import TrainingConfig, load_questions, train_hypernetwork

if TYPE_CHECKING:
    from torch import Tensor

    from knowstore.experts import TokensHypernetwork
    from knowstore.training import TrainingData

SIGNALS: Mapping[str, Mapping[str, Any]] = {
    "no-pointing": {"pointing_weight": 0.0},
    "completion": {"completion_weight": 0.3},
    "contrast": {"contrast_weight": 0.3},
    "nothing": {"nothing_weight": 0.3},
    "distil": {"distil_weight": 0.5},
    "mounted-4": {"n_mounted": 4},
    "hard-negatives": {"n_mounted": 4, "has_hard_negatives": True},
}
"""What a run of `TrainingConfig` is changed by."""

PARTS: Mapping[str, Callable[[TokensHypernetwork], Sequence[Tensor]]] = {
    "no-code": lambda it: (it.key_code.weight, it.key_code.bias, it.value_code.weight, it.value_code.bias),
    "no-word": lambda it: (it.key_word.weight,),
    "no-before": lambda it: (it.key_before.weight,),
    "no-value-code": lambda it: (it.value_code.weight, it.value_code.bias),
    "no-query": lambda it: tuple(it.query_down),
    "no-static": lambda it: tuple(it.static_parts),
}
"""The weights that are nought where a part is left out: what a neuron knows of its word in the passage, of the word and
of the one before it, what it adds beside its word, the query experts, and the static expert."""

SCALES: Mapping[str, float] = {"half-values": 0.5, "double-values": 2.0}
"""Times what neurons add."""

VARIANTS = ("whole", *SIGNALS, *PARTS, *SCALES)


@dataclass(frozen=True)
class AblationConfig:
    """Which `variants` of VARIANTS are compared, each from the hypernetwork `start` (a name or folder) and trained on
    by `training`, or not at all where that has 0 minutes; then scored on up to `limit` questions of each file, drawn
    with `seed`; answers have up to `max_tokens`."""

    start: str = "default"
    variants: tuple[str, ...] = VARIANTS
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(minutes=10.0, pointing_share=0.0, static_steps=0)
    )
    limit: int = 200
    seed: int = 0
    max_tokens: int = 32

    @property
    def is_trained(self) -> bool:
        return self.training.minutes > 0 or self.training.steps is not None


def run_ablation(
    train: Sequence[Path],
    data: Sequence[Path],
    output: Path,
    *,
    config: AblationConfig,
    models: ModelConfig | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, object]:
    """Train each variant and score its experts, gold against shuffled and against the first variant's.

    Cut off, the same call goes on: variants that were scored are not trained again, and the one that was being trained
    goes on from its last checkpoint. `settings.json` in `output` says which call.

    Args:
        train: QA files to train on; none where nothing is trained.
        data: QA files that are asked.
        output: folder for `VARIANT/` with the hypernetwork and its scores, and for `ablation.json`.
        config: what is compared.
        models: the other models; `hypernetwork` of it makes no difference.

    Returns: `rows` of {variant, data, n, steps, seconds, gold_em, shuffled_em, em_gain, em_change, and the same of
        f1}, each score with its bootstrap 95 % interval under `_ci`: gains are gold minus shuffled, changes gold minus
        the first variant's gold, on the same questions; `seconds` are those of its training. And `seconds`, of this
        call, and `config`.

    Raises:
        ConfigError: no variants, unknown ones, signals without training, training without files, `distil` without a
            reader, a start of another kind than `tokens`, `output` holds a run of other settings, models or files, or
            fewer than two questions.
        HypernetworkError: the start was never trained, or not for this LLM.
        TrainingError: a file that cannot be read, or a run that fails.
    """
    started = time.perf_counter()
    _check(config, train)
    models = replace(models or ModelConfig(), hypernetwork=config.start)
    loaded = LoadedModels(models, on_progress=on_progress)
    loaded.check_trained()
    if config.is_trained and "distil" in config.variants and loaded.reader is None:
        raise ConfigError(
            "there is no reader to distil", kept="nothing was measured",
            fix="name one that was trained for this language model with `--reader`, or other variants",
        )  # fmt: skip
    described = asdict(config)
    settings = described | asdict(models) | {"start": loaded.digest("hypernetwork")}
    is_begun = any(output.glob("*/config.json")) or any(output.glob("*/training"))
    keep_run(output / "settings.json", settings, digest_of([*train, *data]), is_begun=is_begun)
    for path in data:
        read_cases(path, config.limit, config.seed)  # refused now, not when a variant was trained
    rows: Rows = []
    questions: TrainingData | None = None
    for place, variant in enumerate(config.variants):
        folder = output / variant
        if on_progress is not None:
            on_progress(variant, place, len(config.variants))
        scores = kept_scores(folder)
        if scores is None:
            if config.is_trained and questions is None:
                questions = load_questions(train, sentence_spans)
            said = _make(variant, questions, folder, config, loaded)
            asked = replace(models, reader=NO_READER)
            found = gains(folder, data, asked, config.limit, config.seed, config.max_tokens, on_progress)
            scores = keep_scores(folder, [{"variant": variant} | said | row | {"golds": golds} for row, golds in found])
        rows += scores
    firsts = {row["data"]: row["golds"] for row in reversed(rows) if row["variant"] == config.variants[0]}
    for row in rows:
        for name, golds in row.pop("golds").items():
            pairs = zip(golds, firsts[row["data"]][name], strict=True)
            row |= share(f"{name}_change", [one - first for one, first in pairs], config.seed)
    result = {"rows": rows, "config": described, "seconds": time.perf_counter() - started}
    (output / "ablation.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return result


def _check(config: AblationConfig, train: Sequence[Path]) -> None:
    """Refuse what cannot be compared before anything is trained."""
    unknown = [name for name in config.variants if name not in VARIANTS]
    if unknown or not config.variants or len(set(config.variants)) < len(config.variants):
        what = f"there is no variant {unknown[0]!r}" if unknown else "the variants are not one or more different ones"
        raise ConfigError(what, kept="nothing was measured", fix=f"name some of: {', '.join(VARIANTS)}")
    if not config.is_trained and (signals := [name for name in config.variants if name in SIGNALS]):
        raise ConfigError(
            f"{signals[0]} changes how a hypernetwork is trained, and none is", kept="nothing was measured",
            fix="give more than 0 minutes, or parts alone",
        )  # fmt: skip
    if config.is_trained and not train:
        raise ConfigError(
            "there are no questions to train on", kept="nothing was measured", fix="give files of them, or 0 minutes"
        )


def _make(
    variant: str, questions: TrainingData | None, folder: Path, config: AblationConfig, loaded: LoadedModels
) -> dict[str, float]:
    """A variant in `folder`, trained on `questions`, or not where there are none; gives its steps and seconds."""
    import torch

    from knowstore.experts import TokensHypernetwork
    from knowstore.retrieval import JointReranker

    loaded = loaded.with_config(loaded.config)
    network = loaded.hypernetwork
    if not isinstance(network, TokensHypernetwork):
        raise ConfigError(
            f"{config.start} is of kind {network.config.kind}", kept="nothing was measured",
            fix="name a hypernetwork of kind `tokens`",
        )  # fmt: skip
    network.set_trainable()
    with torch.no_grad():
        for part in PARTS[variant](network) if variant in PARTS else ():
            part.zero_()
            part.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
        network.log_value.add_(math.log(SCALES.get(variant, 1.0)))
    steps, seconds = 0, 0.0
    if questions is not None:
        training = replace(config.training, **SIGNALS.get(variant, {}))
        reranker = loaded.reranker
        kept = train_hypernetwork(
            network, loaded.llm, questions, training, folder / "training", is_started=True,
            reranker=reranker if isinstance(reranker, JointReranker) else None,
            teacher=loaded.reader if training.distil_weight else None,
            on_progress=percent_shown(f"training {variant}", loaded.on_progress),
        )  # fmt: skip
        steps, seconds = kept.step, kept.seconds
        network.config = replace(network.config, trained_steps=network.config.trained_steps + steps)
    network.save(folder)
    return {"steps": steps, "seconds": seconds}
