"""Tiny training runs: they learn, go on where they stopped, and read states once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from knowstore.errors import TrainingError
from knowstore.experts import FrozenLLM, PassageInput, TokensConfig, TokensHypernetwork, load_hypernetwork
from knowstore.experts.llm import pad_ids
from knowstore.prompts import answer_target, question_prompt
from knowstore.training import QuestionRow, TrainingConfig, TrainingData, TrainingProgress, train_tokens
from knowstore.training.cache import StateCache

NAMES = ("Rome", "Lyon", "Ostia", "Tiber", "Saône", "Remus")
PLACES = ("the sea", "a river", "the town", "a king", "the end", "it")
CONFIG = TrainingConfig(
    batch_size=4, learning_rate=5e-3, warmup=2, mix_from=0.5, mix_share=0.5, n_held_out=2, validate_every=4, steps=8
)
Train = Callable[..., TokensHypernetwork]


@pytest.fixture(scope="module")
def data() -> TrainingData:
    """Six passages of two sentences with a question on each of four and two on the others."""
    passages, questions = [], []
    for number, (name, place) in enumerate(zip(NAMES, PLACES, strict=True)):
        first, second = f"{name} lies on {place}.", f"It was founded by {NAMES[number - 1]}."
        text = f"{first} {second}"
        passages.append(PassageInput(name, text, ((0, len(first)), (len(first) + 1, len(text)))))
        questions.append(QuestionRow(f"Where does {name} lie?", (place,), number, 0))
        if number % 2:
            questions.append(QuestionRow(f"Who founded {name}?", (NAMES[number - 1],), number, 1))
    return TrainingData(tuple(passages), tuple(questions))


@pytest.fixture
def train(tiny_llm: FrozenLLM, tiny_hypernetwork_dir: Path, data: TrainingData, tmp_path: Path) -> Train:
    """A function that trains a new hypernetwork into a folder of `tmp_path`."""
    config = load_hypernetwork(tiny_hypernetwork_dir).config
    assert isinstance(config, TokensConfig)

    def run(
        settings: TrainingConfig,
        folder: str = "run",
        on_progress: Callable[[TrainingProgress], None] | None = None,
        rows: TrainingData = data,
    ) -> TokensHypernetwork:
        torch.manual_seed(0)
        fresh = TokensHypernetwork(replace(config, trained_steps=0))
        return train_tokens(fresh, tiny_llm, rows, settings, tmp_path / folder, on_progress=on_progress)

    return run


def test_a_few_steps_lower_the_loss_on_the_same_batch(train: Train) -> None:
    seen: list[TrainingProgress] = []
    settings = replace(CONFIG, batch_size=6, n_held_out=1, mix_share=0.0, steps=25, validate_every=1000)
    trained = train(settings, on_progress=seen.append)
    losses = [progress.loss for progress in seen]
    assert len(losses) == 25
    assert losses[-1] < 0.7 * losses[0]
    assert all(bool(parameter.isfinite().all()) for parameter in trained.parameters())


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(train: Train, tmp_path: Path) -> None:
    settings = replace(CONFIG, checkpoint_every_s=0.0)
    whole = train(settings, "whole")

    def stop(progress: TrainingProgress) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, "cut", stop)
    steps: list[int] = []
    resumed = train(settings, "cut", lambda progress: steps.append(progress.step))
    assert steps == [5, 6, 7, 8]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert [file.suffix for file in sorted((tmp_path / "cut" / "checkpoint").iterdir())] == [".json", ".safetensors"]


def test_a_finished_run_is_not_trained_further(train: Train) -> None:
    steps: list[TrainingProgress] = []
    first = train(CONFIG)
    again = train(CONFIG, on_progress=steps.append)
    assert steps == []
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_the_log_holds_every_step_and_the_validations(train: Train, tmp_path: Path) -> None:
    train(CONFIG)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["gold"] is not None for line in lines] == [False, False, False, True] * 2
    assert lines[3]["gold"] != lines[3]["shuffled"]


def test_the_llm_stays_as_it_is(train: Train, tiny_llm: FrozenLLM) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_llm.model.state_dict().items()}
    attention = tiny_llm.model.config._attn_implementation
    train(replace(CONFIG, steps=2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llm.model.state_dict().items())
    assert tiny_llm.model.config._attn_implementation == attention
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_llm.model.modules())


def test_a_checkpoint_of_other_settings_is_refused(train: Train) -> None:
    train(replace(CONFIG, steps=1))
    with pytest.raises(TrainingError, match="a run with other settings"):
        train(replace(CONFIG, steps=1, learning_rate=1e-3))


def test_fewer_questions_than_a_batch_are_refused(train: Train) -> None:
    with pytest.raises(TrainingError, match="questions to train on, a batch takes 40"):
        train(replace(CONFIG, batch_size=40))


def test_questions_without_room_for_an_answer_are_left_out(train: Train, data: TrainingData) -> None:
    long = tuple(replace(row, question="Where " * 100) for row in data.questions[:5])
    with pytest.raises(TrainingError, match="questions to train on"):
        train(replace(CONFIG, n_held_out=0), rows=replace(data, questions=(*long, *data.questions[5:8])))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(train: Train, tmp_path: Path) -> None:
    settings = replace(CONFIG, learning_rate=1e30, max_gradient_norm=1e30, warmup=1, checkpoint_every_s=0.0)
    with pytest.raises(TrainingError, match=r"the loss is \S+ at step \d") as caught:
        train(settings)
    assert str(tmp_path / "run" / "checkpoint") in caught.value.kept
    assert (tmp_path / "run" / "checkpoint" / "run.json").exists()


def test_cached_states_are_the_models_own_in_bfloat16(
    train: Train, tiny_llm: FrozenLLM, data: TrainingData, tmp_path: Path
) -> None:
    train(replace(CONFIG, steps=1))
    rows = [
        tiny_llm.prompt_ids(question_prompt(row.question))
        + tiny_llm.prompt_ids(answer_target(row.answers[0]), is_start=False)
        for row in data.questions
    ]
    cache = StateCache(
        tmp_path / "run" / "states" / "questions.bf16", [len(row) for row in rows], tiny_llm.width, lambda missing: []
    )
    is_done = [bool(done) for done in (tmp_path / "run" / "states" / "questions.done").read_bytes()]
    assert any(is_done)
    for index, row in enumerate(rows):
        if is_done[index]:
            states = tiny_llm.states(pad_ids([row]), 1)[0][0]
            torch.testing.assert_close(cache.get([index])[0].float(), states, rtol=1e-2, atol=1e-2)


def test_states_are_computed_once_and_only_when_asked_for(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def compute(missing: list[int]) -> list[Tensor]:
        asked.append(missing)
        return [torch.full((index + 1, 2), float(index)) for index in missing]

    cache = StateCache(tmp_path / "states.bf16", [1, 2, 3], 2, compute)
    assert asked == []
    assert [tuple(states.shape) for states in cache.get([2, 0, 2])] == [(3, 2), (1, 2), (3, 2)]
    assert asked == [[0, 2]]
    again = StateCache(tmp_path / "states.bf16", [1, 2, 3], 2, compute)
    assert again.get([2])[0].tolist() == [[2.0, 2.0]] * 3
    assert asked == [[0, 2]]
    again.get([1])
    assert asked == [[0, 2], [1]]
    StateCache(tmp_path / "states.bf16", [1, 2, 4], 2, compute).get([0])
    assert asked[-1] == [0]
