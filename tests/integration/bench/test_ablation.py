"""The ablation on tiny models: each variant is trained and scored once, beside the first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from knowstore.bench import AblationConfig, can_plot, plot_ablation, run_ablation
from knowstore.bench.ablation import PARTS, SIGNALS
from knowstore.bench.controls import ControlBench
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError, HypernetworkError
from knowstore.experts import load_hypernetwork
from knowstore.training import TrainingConfig, TrainingProgress

TRAINING = TrainingConfig(steps=2, batch_questions=4, n_held_out=0, pointing_share=0.0, static_steps=0, warmup=0)
UNTRAINED = TrainingConfig(minutes=0.0)


@pytest.fixture
def config(tiny_models: ModelConfig) -> AblationConfig:
    return AblationConfig(tiny_models.hypernetwork, training=TRAINING, limit=4, max_tokens=2)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_hypernetwork(folder).own_tensors()


def test_what_was_left_out_stays_out_while_the_rest_is_trained(
    tiny_models: ModelConfig, config: AblationConfig, questions: Path, tmp_path: Path
) -> None:
    config = replace(config, variants=("whole", "no-code", "no-query"))
    found: dict[str, Any] = run_ablation([questions], [questions], tmp_path, config=config, models=tiny_models)
    assert [(row["variant"], row["n"], row["steps"]) for row in found["rows"]] == [
        ("whole", 4, 2), ("no-code", 4, 2), ("no-query", 4, 2)
    ]  # fmt: skip
    before = _weights(Path(tiny_models.hypernetwork))
    for variant, left_out in (("no-code", ("key_code.", "value_code.")), ("no-query", ("query_down.",))):
        after = _weights(tmp_path / variant)
        for name, tensor in after.items():
            if name.startswith(left_out):
                assert not tensor.any(), name
        assert not torch.equal(after["key_before.weight"], before["key_before.weight"])
    assert _weights(tmp_path / "whole")["key_code.weight"].any()


@pytest.mark.parametrize("variant", SIGNALS)
def test_each_signal_changes_how_it_is_trained(
    variant: str, tiny_models: ModelConfig, config: AblationConfig, questions: Path, tmp_path: Path,
    tiny_reader_dir: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def nothing_is_learnt(network: Any, llm: Any, data: Any, training: TrainingConfig, *_: Any, **given: Any) -> Any:
        seen.append((training, given["teacher"] is not None))
        return TrainingProgress(step=1, seconds=2.0, fraction=1.0, part="answering", loss=0.0, gradient_norm=0.0)

    seen: list[tuple[TrainingConfig, bool]] = []
    monkeypatch.setattr("knowstore.bench.ablation.train_hypernetwork", nothing_is_learnt)
    config = replace(config, variants=("whole", variant))
    models = replace(tiny_models, reader=str(tiny_reader_dir))
    found: dict[str, Any] = run_ablation([questions], [questions], tmp_path, config=config, models=models)
    assert seen == [(TRAINING, False), (replace(TRAINING, **SIGNALS[variant]), variant == "distil")]
    assert seen[1][0] != TRAINING
    assert [(row["steps"], row["seconds"]) for row in found["rows"]] == [(1, 2.0)] * 2
    begun, after = (load_hypernetwork(Path(folder)) for folder in (tiny_models.hypernetwork, tmp_path / variant))
    assert after.config.trained_steps == begun.config.trained_steps + 1


def test_changes_are_against_the_first_variant_on_the_same_questions(
    tiny_models: ModelConfig, config: AblationConfig, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(bench: ControlBench, method: str, indices: Sequence[int], passages: Sequence[int]) -> list[str]:
        is_worse = "no-word" in bench.models.config.hypernetwork
        known = [not is_worse or place > 0 for place in range(len(indices))]
        right = [index == passage for index, passage in zip(indices, passages, strict=True)]
        return [
            bench.cases[index].answers[0] if both else "?"
            for index, *both_of in zip(indices, known, right, strict=True)
            for both in [all(both_of)]
        ]

    monkeypatch.setattr(ControlBench, "answers", answers)
    config = replace(config, training=UNTRAINED, variants=("whole", "no-word"))
    found: dict[str, Any] = run_ablation([], [questions, questions], tmp_path, config=config, models=tiny_models)
    assert [(row["gold_em"], row["em_gain"], row["em_change"], row["f1_change"]) for row in found["rows"]] == [
        *[(1.0, 1.0, 0.0, 0.0)] * 2, *[(0.75, 0.75, -0.25, -0.25)] * 2
    ]  # fmt: skip
    assert json.loads((tmp_path / "ablation.json").read_text("utf-8"))["rows"] == json.loads(json.dumps(found["rows"]))
    assert [row["steps"] for row in found["rows"]] == [0] * 4
    if not can_plot():
        pytest.skip("extra `plots` is not installed")
    plot_ablation(found["rows"], tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_without_training_only_what_the_variant_names_is_other(
    tiny_models: ModelConfig, config: AblationConfig, questions: Path, tmp_path: Path
) -> None:
    variants = ("whole", *PARTS, "double-values")
    config = replace(config, training=UNTRAINED, variants=variants)
    run_ablation([], [questions], tmp_path, config=config, models=tiny_models)
    whole = _weights(tmp_path / "whole")
    left_out = {
        "no-code": {"key_code.weight", "key_code.bias", "value_code.weight", "value_code.bias"},
        "no-word": {"key_word.weight"},
        "no-before": {"key_before.weight"},
        "no-value-code": {"value_code.weight", "value_code.bias"},
        "no-query": {name for name in whole if name.startswith("query_down.")},
        "no-static": {name for name in whole if name.startswith("static_parts.")},
    }
    assert left_out.keys() == PARTS.keys()
    for variant in PARTS:
        weights = _weights(tmp_path / variant)
        other = {name for name, tensor in weights.items() if not torch.equal(tensor, whole[name])}
        assert other == {name for name in left_out[variant] if whole[name].any()} != set(), variant
        assert not any(weights[name].any() for name in left_out[variant]), variant
    scaled = _weights(tmp_path / "double-values")
    assert [name for name, tensor in scaled.items() if not torch.equal(tensor, whole[name])] == ["log_value"]
    assert torch.allclose(_weights(tmp_path / "double-values")["log_value"].exp(), 2 * whole["log_value"].exp())


def test_an_ablation_that_was_cut_off_goes_on_with_the_variants_that_lack(
    tiny_models: ModelConfig, config: AblationConfig, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(bench: ControlBench, *arguments: Any) -> list[str]:
        scored.append(Path(bench.models.config.hypernetwork).name)
        if scored == ["whole", "whole", "contrast"]:
            raise KeyboardInterrupt
        return real(bench, *arguments)

    real, scored = ControlBench.answers, list[str]()
    monkeypatch.setattr(ControlBench, "answers", answers)
    config = replace(config, variants=("whole", "contrast"))
    with pytest.raises(KeyboardInterrupt):
        run_ablation([questions], [questions], tmp_path, config=config, models=tiny_models)
    log = (tmp_path / "contrast" / "training" / "log.jsonl").read_text("utf-8")
    run_ablation([questions], [questions], tmp_path, config=config, models=tiny_models)
    assert scored == ["whole", "whole", "contrast", "contrast", "contrast"]
    assert (tmp_path / "contrast" / "training" / "log.jsonl").read_text("utf-8") == log  # not trained again
    with pytest.raises(ConfigError, match="is not known to be this one: limit is 4, not 3"):
        run_ablation([questions], [questions], tmp_path, config=replace(config, limit=3), models=tiny_models)


def test_what_cannot_be_compared_is_refused_before_training(
    tiny_models: ModelConfig, config: AblationConfig, questions: Path, tmp_path: Path
) -> None:
    for variants, why in (
        ((), "the variants are not one or more different ones"),
        (("whole", "whole"), "the variants are not one or more different ones"),
        (("whole", "no-such"), "there is no variant 'no-such'"),
    ):
        with pytest.raises(ConfigError, match=why):
            run_ablation([questions], [questions], tmp_path, config=replace(config, variants=variants))
    with pytest.raises(ConfigError, match="no-pointing changes how a hypernetwork is trained, and none is"):
        run_ablation([], [questions], tmp_path, config=replace(config, training=UNTRAINED))
    with pytest.raises(ConfigError, match="no questions to train on"):
        run_ablation([], [questions], tmp_path, config=config)
    with pytest.raises(ConfigError, match="no reader to distil"):
        run_ablation([questions], [questions], tmp_path, config=config, models=tiny_models)
    new = load_hypernetwork(Path(tiny_models.hypernetwork))
    new.config = replace(new.config, trained_steps=0)
    new.save(tmp_path / "new")
    with pytest.raises(HypernetworkError, match="never trained"):
        run_ablation([questions], [questions], tmp_path, config=replace(config, start=str(tmp_path / "new")))
    assert [one.name for one in tmp_path.iterdir()] == ["new"]
