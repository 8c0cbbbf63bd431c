"""The sweep of layers on tiny models: each is trained and scored once, by what its experts add to another's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from knowstore.bench import LayersConfig, can_plot, plot_layers, run_layers
from knowstore.bench.controls import ControlBench
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError, TrainingError
from knowstore.experts import TokensHypernetwork, load_hypernetwork
from knowstore.training import TrainingConfig, TrainingProgress

TRAINING = TrainingConfig(steps=2, batch_questions=4, n_held_out=0, static_steps=0)
CONFIG = LayersConfig((0, 2), training=TRAINING, limit=4, max_tokens=2)


def test_each_layer_is_trained_alike_and_scored_against_another_passage(
    tiny_models: ModelConfig, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(bench: ControlBench, method: str, indices: list[int], passages: list[int]) -> list[str]:
        asked.append((bench.models.hypernetwork.config.layer, method))
        right = [index == passage for index, passage in zip(indices, passages, strict=True)]
        return [
            bench.cases[index].answers[0] if is_right else "?" for index, is_right in zip(indices, right, strict=True)
        ]

    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(ControlBench, "answers", answers)
    found: dict[str, Any] = run_layers([questions], [questions], tmp_path, config=CONFIG, models=tiny_models)
    assert asked == [(0, "tokens")] * 2 + [(2, "tokens")] * 2
    assert [(row["layer"], row["n"], row["steps"]) for row in found["rows"]] == [(0, 4, 2), (2, 4, 2)]
    for row in found["rows"]:
        assert (row["gold_em"], row["shuffled_em"], row["em_gain"], row["em_gain_ci"]) == (1.0, 0.0, 1.0, [1.0, 1.0])
        config = load_hypernetwork(tmp_path / f"layer-{row['layer']}").config
        assert (config.layer, config.trained_steps) == (row["layer"], 2)
    assert json.loads((tmp_path / "layers.json").read_text("utf-8"))["rows"] == found["rows"]
    if not can_plot():
        pytest.skip("extra `plots` is not installed")
    plot_layers(found["rows"], tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_each_layer_can_begin_with_a_trained_encoder(
    tiny_models: ModelConfig, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_is_learnt(network: TokensHypernetwork, *_: Any, **__: Any) -> TrainingProgress:
        return TrainingProgress(step=1, seconds=0.0, fraction=1.0, part="answering", loss=0.0, gradient_norm=0.0)

    monkeypatch.setattr("knowstore.bench.layers.train_hypernetwork", nothing_is_learnt)
    config = replace(CONFIG, encoder_from=tiny_models.hypernetwork)
    run_layers([questions], [questions], tmp_path, config=config, models=tiny_models)
    trained = load_hypernetwork(Path(tiny_models.hypernetwork)).own_tensors()
    for layer in CONFIG.layers:
        begun = load_hypernetwork(tmp_path / f"layer-{layer}").own_tensors()
        for name, tensor in trained.items():
            is_reading = name.startswith(("encoder.", "code."))
            assert not is_reading or torch.equal(begun[name], tensor), name
        assert not torch.equal(begun["key_code.weight"], trained["key_code.weight"])
    monkeypatch.undo()
    other = replace(config, encoder_from=str(tmp_path / "layer-0"))
    with pytest.raises(ConfigError, match="is not known to be this one: encoder_from is"):
        run_layers([questions], [questions], tmp_path, config=other, models=tiny_models)


@pytest.mark.skipif(not can_plot(), reason="extra `plots` is not installed")
@pytest.mark.parametrize(("steps", "said"), [((1200, 1200), "1,200 steps"), ((1200, 950), "950 to 1,200 steps")])
def test_the_picture_says_how_long_each_layer_was_trained(steps: tuple[int, int], said: str, tmp_path: Path) -> None:
    gains = {"em_gain": 0.1, "em_gain_ci": (0.0, 0.2), "f1_gain": 0.1, "f1_gain_ci": (0.0, 0.2)}
    rows = [{"layer": layer, "data": "qa", "n": 4, "steps": n, **gains} for layer, n in enumerate(steps)]
    plot_layers(rows, tmp_path / "layers.svg")
    assert f"<!-- qa, 4 questions, {said} -->" in (tmp_path / "layers.svg").read_text("utf-8")


def test_a_sweep_that_was_cut_off_goes_on_with_the_layers_that_lack(
    tiny_models: ModelConfig, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, scored = ControlBench.answers, list[int]()

    def answers(bench: ControlBench, *arguments: Any) -> list[str]:
        scored.append(bench.models.hypernetwork.config.layer)
        if scored == [0, 0, 2]:
            raise KeyboardInterrupt
        return real(bench, *arguments)

    monkeypatch.setattr(ControlBench, "answers", answers)
    config = replace(CONFIG, kind="pooled")
    less = tmp_path / "less.jsonl"
    less.write_text("".join(questions.read_text("utf-8").splitlines(keepends=True)[:3]), "utf-8")
    with pytest.raises(KeyboardInterrupt):
        run_layers([questions], [questions], tmp_path, config=config, models=tiny_models)
    log = (tmp_path / "layer-2" / "training" / "log.jsonl").read_text("utf-8")
    found: dict[str, Any] = run_layers([questions], [questions], tmp_path, config=config, models=tiny_models)
    assert scored == [0, 0, 2, 2, 2]
    assert [row["layer"] for row in found["rows"]] == [0, 2]
    assert (tmp_path / "layer-2" / "training" / "log.jsonl").read_text("utf-8") == log  # not trained again
    others: list[tuple[LayersConfig, ModelConfig, Path, str]] = [
        (replace(config, limit=3), tiny_models, questions, "limit is 4, not 3"),
        (config, replace(tiny_models, device="cuda"), questions, "device is cpu, not cuda"),
        (config, tiny_models, less, "its files held something else"),
    ]
    for settings, models, data, why in others:
        with pytest.raises(ConfigError, match=f"is not known to be this one: {why}"):
            run_layers([questions], [data], tmp_path, config=settings, models=models)


def test_a_mistake_in_the_files_costs_no_training_and_can_be_mended(
    tiny_models: ModelConfig, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knowstore.bench.layers._train", lambda *_: pytest.fail("a layer was trained"))
    for train, data in (("missing", questions), (questions, "missing")):
        with pytest.raises(TrainingError, match="missing cannot be read"):
            run_layers([Path(train)], [Path(data)], tmp_path, config=CONFIG, models=tiny_models)
    few = tmp_path / "few.jsonl"
    few.write_text(questions.read_text("utf-8").splitlines()[0], "utf-8")
    with pytest.raises(ConfigError, match="controls need two"):
        run_layers([questions], [few], tmp_path, config=CONFIG, models=tiny_models)
    with pytest.raises(ConfigError, match="cannot be compared"):
        run_layers([questions], [questions], tmp_path, config=replace(CONFIG, layers=(7,)), models=tiny_models)
    monkeypatch.undo()
    found: Any = run_layers([questions], [questions], tmp_path, config=replace(CONFIG, layers=(0,)), models=tiny_models)
    assert len(found["rows"]) == 1


@pytest.mark.parametrize("layers", [(), (0, 0), (1, 3)])
def test_layers_that_cannot_be_compared_are_refused_before_training(
    layers: tuple[int, ...], tiny_models: ModelConfig, questions: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="of a model of 3 layers cannot be compared"):
        run_layers([questions], [questions], tmp_path, config=replace(CONFIG, layers=layers), models=tiny_models)
    assert not (tmp_path / "layer-0").exists()
