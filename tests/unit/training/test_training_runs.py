"""Tiny training runs: they learn, go on where they stopped, and read states once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from knowstore.encoders import load_base
from knowstore.errors import TrainingError
from knowstore.experts import (
    Factors,
    FrozenLLM,
    PassageInput,
    PooledConfig,
    PooledHypernetwork,
    TokensConfig,
    TokensHypernetwork,
    combine,
    load_hypernetwork,
    mount,
)
from knowstore.retrieval import JointConfig, JointModel, JointReranker, RerankItem, relevance
from knowstore.training import QuestionRow, TrainingConfig, TrainingData, TrainingProgress, train_hypernetwork
from knowstore.training.extent import n_kept_out
from knowstore.training.hypernetwork import _Loop
from knowstore.training.pooled import PooledRun
from knowstore.training.run import Batch, TokensRun
from knowstore.training.start import _word_map, pooled_start

NAMES = ("Rome", "Lyon", "Ostia", "Tiber", "Saône", "Remus")
PLACES = ("the sea", "a river", "the town", "a king", "the end", "it")
CONFIG = TrainingConfig(
    batch_questions=4, learning_rate=5e-3, warmup=2, pointing_share=0.5, static_steps=1, n_held_out=2,
    validate_every=4, steps=8,
)  # fmt: skip
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
        fresh = TokensHypernetwork(replace(config, trained_steps=0), load_base(config.base))
        train_hypernetwork(fresh, tiny_llm, rows, settings, tmp_path / folder, on_progress=on_progress)
        return fresh

    return run


def test_a_few_steps_lower_the_loss_on_the_same_batch(train: Train) -> None:
    seen: list[TrainingProgress] = []
    settings = replace(CONFIG, batch_questions=40, n_held_out=1, pointing_share=0.5, steps=60, validate_every=1000)
    trained = train(settings, on_progress=seen.append)
    pointing = [progress.loss for progress in seen if progress.part == "pointing"]
    answering = [progress.answer for progress in seen if progress.answer is not None]
    assert pointing[-1] < 0.7 * pointing[0]
    assert answering[-1] < 0.7 * answering[0]
    assert all(bool(parameter.isfinite().all()) for parameter in trained.parameters())


def test_neurons_weigh_in_training_what_the_reranker_says(
    tiny_llm: FrozenLLM, tiny_hypernetwork_dir: Path, data: TrainingData
) -> None:
    config = load_hypernetwork(tiny_hypernetwork_dir).config
    assert isinstance(config, TokensConfig)
    base = load_base(config.base)
    torch.manual_seed(0)
    reranker = JointReranker(JointModel(load_base(config.base)), JointConfig(base.digest))
    run = TokensRun(TokensHypernetwork(config, base), tiny_llm, data, 6, reranker)
    question = run.by_passage[1][1]
    items = [RerankItem(one.title, one.text, one.spans) for one in data.passages[1:3]]
    scores = reranker.score(data.questions[question].question, items)
    r = relevance([one.score for one in scores])
    by_sentence = run.reranked_weights(reranker, question, [1, 2], is_of_words=False)
    for found, score, weight, passage in zip(by_sentence, scores, r, (1, 2), strict=True):
        shares = relevance(score.segment_scores)
        spans = run.passages[passage].spans
        expected = [weight * share for (a, b), share in zip(spans, shares, strict=True) for _ in range(a, b)]
        assert found == pytest.approx(expected)
    by_word = run.reranked_weights(reranker, question, [1, 2], is_of_words=True)
    assert [max(found) for found in by_word] == pytest.approx([max(found) for found in by_sentence])
    assert len(by_word[0]) == len(by_sentence[0])


def test_pooled_is_trained_by_the_papers_recipe(tiny_llm: FrozenLLM, data: TrainingData, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = PooledHypernetwork(PooledConfig(tiny_llm.width, layer=1, rank=4, bottleneck=8))
    settings = replace(TrainingConfig.paper(), batch_questions=4, n_held_out=1, learning_rate=2e-2, epochs=30.0)
    seen: list[TrainingProgress] = []
    train_hypernetwork(network, tiny_llm, data, settings, tmp_path / "run", on_progress=seen.append)
    answers = [progress.answer for progress in seen if progress.answer is not None]
    assert len(answers) == len(seen) == 30
    assert sum(answers[-5:]) < 0.8 * sum(answers[:5])
    assert {progress.part for progress in seen} == {"answering"}


def test_pooled_can_start_by_adding_what_tells_a_passage_from_others(tiny_llm: FrozenLLM, data: TrainingData) -> None:
    torch.manual_seed(0)
    D = tiny_llm.width
    network = PooledHypernetwork(PooledConfig(D, layer=1, rank=4, bottleneck=2 * D))
    run = PooledRun(network, tiny_llm, data, 6)
    prompts = [question.ids for question in run.questions.values()]

    pooled_start(network, tiny_llm, prompts, run.means)

    words = run.means - run.means.mean(0)
    added = words @ _word_map(tiny_llm)
    added *= 30 / added.norm(dim=-1).mean()
    states = torch.cat([tiny_llm.states(torch.tensor([ids]), 1)[0, 1:].float() for ids in prompts])
    for expert, wanted in zip(network.generate(tiny_llm, data.passages), added, strict=True):
        output = Factors(**expert.tensors).output(states)
        assert output.norm(dim=-1).mean() == pytest.approx(float(wanted.norm()), rel=0.05)
        assert torch.nn.functional.cosine_similarity(output, wanted[None]).min() > 0.999


def test_pooled_that_starts_so_learns_too(tiny_llm: FrozenLLM, data: TrainingData, tmp_path: Path) -> None:
    losses = {}
    for start in ("paper", "analytic"):
        torch.manual_seed(0)
        network = PooledHypernetwork(PooledConfig(tiny_llm.width, layer=1, rank=4, bottleneck=8))
        settings = replace(CONFIG, pooled_start=start, steps=20, warmup=2)
        seen: list[TrainingProgress] = []
        train_hypernetwork(network, tiny_llm, data, settings, tmp_path / start, on_progress=seen.append)
        losses[start] = [progress.answer for progress in seen if progress.answer is not None]
    assert losses["analytic"][0] != losses["paper"][0]
    assert sum(losses["analytic"][-5:]) < sum(losses["analytic"][:5])


def test_the_nats_of_pooled_are_those_of_its_mounted_expert(tiny_llm: FrozenLLM, data: TrainingData) -> None:
    torch.manual_seed(0)
    network = PooledHypernetwork(PooledConfig(tiny_llm.width, layer=1, rank=4, bottleneck=8))
    run = PooledRun(network, tiny_llm, data, 6)
    batch = Batch([0, 2], [run.by_passage[0], run.by_passage[2]])
    for is_own, passages in ((True, (0, 2)), (False, (2, 0))):
        experts = network.generate(tiny_llm, [data.passages[passage] for passage in passages])
        nats, n = 0.0, 0
        for expert, (_, question) in zip(experts, batch.rows, strict=True):
            asked = run.questions[question]
            mounted = combine([[(expert, 1.0, None)]], device=tiny_llm.device, dtype=tiny_llm.dtype)
            with torch.inference_mode(), mount(tiny_llm.model, mounted, 1):
                logits = tiny_llm.model(torch.tensor([asked.ids])).logits[0].float().log_softmax(-1)
            for place in range(asked.n_question, len(asked.ids)):
                nats -= float(logits[place - 1, asked.ids[place]])
                n += 1
        assert run.answer_nats(batch, run.validated(batch, is_own=is_own)) == pytest.approx(nats / n, rel=1e-3)


def test_a_run_without_gain_ends_early_with_the_best_weights(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    gains = iter([(0.2, 0.1), (0.5, 0.1), (0.4, 0.1), (0.3, 0.0), (0.9, 0.0)])
    seen: list[torch.Tensor] = []

    def validate(loop: _Loop, _: object) -> dict[str, float]:
        weights = loop.run.network.own_tensors()
        seen.append(weights["key_code.weight"].clone())
        return dict(zip(("gold_f1", "shuffled_f1"), next(gains), strict=True))

    monkeypatch.setattr(_Loop, "_validate", validate)
    trained = train(replace(CONFIG, pointing_share=0.0, static_steps=0, validate_every=2, patience=2, steps=20))
    assert len(seen) == 4
    assert torch.equal(trained.key_code.weight, seen[1])
    assert not torch.equal(seen[1], seen[3])


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
    assert steps == [6, 7, 8]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert [file.suffix for file in sorted((tmp_path / "cut" / "checkpoint").iterdir())] == [".json", ".safetensors"]


def test_a_finished_run_tells_again_what_it_kept(tiny_llm: FrozenLLM, data: TrainingData, tmp_path: Path) -> None:
    def run() -> TrainingProgress | None:
        torch.manual_seed(0)
        network = PooledHypernetwork(PooledConfig(tiny_llm.width, layer=1, rank=4, bottleneck=8))
        return train_hypernetwork(network, tiny_llm, data, replace(CONFIG, steps=5), tmp_path / "run")

    first = run()
    assert first is not None
    assert first.step == 5
    assert first.gold is not None  # of the validation at step 4
    assert run() == first


@pytest.mark.parametrize("nothing", [{"steps": 0}, {"steps": None, "minutes": 0.0}])
def test_a_run_of_no_steps_is_refused(train: Train, tmp_path: Path, nothing: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="no time and no steps"):
        train(replace(CONFIG, **nothing))
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_tenth_of_the_questions_is_kept_out_unless_a_number_is_given(data: TrainingData) -> None:
    many = replace(data, questions=data.questions * 5)
    assert n_kept_out(None, many) == 4  # of 45
    assert n_kept_out(None, replace(data, questions=data.questions * 300)) == 200
    assert n_kept_out(30, data) == 30


def test_a_checkpoint_on_other_questions_is_refused(
    tiny_llm: FrozenLLM, tiny_hypernetwork_dir: Path, data: TrainingData, tmp_path: Path
) -> None:
    settings = replace(CONFIG, steps=1)
    train_hypernetwork(load_hypernetwork(tiny_hypernetwork_dir), tiny_llm, data, settings, tmp_path)
    other = replace(data, questions=data.questions[::-1])
    with pytest.raises(TrainingError, match="on other questions"):
        train_hypernetwork(load_hypernetwork(tiny_hypernetwork_dir), tiny_llm, other, settings, tmp_path)
    described = json.loads((tmp_path / "checkpoint" / "run.json").read_text("utf-8"))
    del described["made_with"]["data"]  # as it was written before
    (tmp_path / "checkpoint" / "run.json").write_text(json.dumps(described), "utf-8")
    again, made_with = load_hypernetwork(tiny_hypernetwork_dir), {"llm": "a"}
    assert train_hypernetwork(again, tiny_llm, data, settings, tmp_path, made_with=made_with).step == 1
    again = load_hypernetwork(tiny_hypernetwork_dir)
    with pytest.raises(TrainingError, match="models"):
        train_hypernetwork(again, tiny_llm, data, settings, tmp_path, made_with={"llm": "b"})


def test_a_checkpoint_of_another_hypernetwork_or_reranker_is_refused(
    train: Train, tiny_llm: FrozenLLM, data: TrainingData, tmp_path: Path
) -> None:
    train(replace(CONFIG, pointing_share=0.0, static_steps=0, steps=1))
    network = PooledHypernetwork(PooledConfig(tiny_llm.width, layer=1))
    with pytest.raises(TrainingError, match="other settings or models"):
        train_hypernetwork(network, tiny_llm, data, replace(CONFIG, steps=1), tmp_path / "run")


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
    assert [line["held_out_accuracy"] is not None for line in lines] == [False, False, False, True] * 2


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


def test_fewer_passages_than_a_batch_are_refused(train: Train) -> None:
    with pytest.raises(TrainingError, match="0 passages with questions to train on, and 6 kept out"):
        train(replace(CONFIG, n_held_out=40))


def test_questions_that_are_too_long_are_left_out(train: Train, data: TrainingData) -> None:
    long = tuple(replace(row, question="Where " * 100) for row in data.questions)
    with pytest.raises(TrainingError, match="0 passages with questions to train on, and 0 kept out"):
        train(CONFIG, rows=replace(data, questions=long))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(train: Train, tmp_path: Path) -> None:
    settings = replace(CONFIG, learning_rate=1e30, max_gradient_norm=1e30, warmup=1, checkpoint_every_s=0.0)
    with pytest.raises(TrainingError, match=r"the loss is \S+ at step \d") as caught:
        train(settings)
    assert str(tmp_path / "run" / "checkpoint") in caught.value.kept
    assert (tmp_path / "run" / "checkpoint" / "run.json").exists()


def test_validation_while_answering_compares_the_passage_with_another(train: Train) -> None:
    seen: list[TrainingProgress] = []
    train(CONFIG, on_progress=seen.append)
    assert [progress.part for progress in seen] == ["pointing"] * 4 + ["answering"] * 4
    assert [progress.answer is None for progress in seen] == [True] * 4 + [False] * 4
    assert [progress.gold is None for progress in seen] == [True] * 7 + [False]
    assert [progress.held_out_accuracy is None for progress in seen] == [True, True, True, False] * 2
    assert seen[-1].gold != seen[-1].shuffled


def test_the_static_expert_is_trained_alone_and_first(train: Train) -> None:
    settings = replace(CONFIG, pointing_share=0.25, static_steps=6, weight_decay=0.0)
    before = train(replace(settings, steps=8), "a").state_dict()
    after = train(replace(settings, steps=8, static_rate=0.1), "b").state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("static_parts") for name in changed)
