"""Tiny training runs of the joint reranker: they learn, go on where they stopped, and are calibrated."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from knowstore.encoders import load_base
from knowstore.errors import TrainingError
from knowstore.experts import PassageInput
from knowstore.retrieval import JointConfig, JointModel, JointReranker, RerankItem, Retriever
from knowstore.store import passage_search
from knowstore.training import (
    Judged,
    QuestionRow,
    RerankerProgress,
    RerankerTrainingConfig,
    TrainingData,
    accuracies,
    calibrate,
    calibrate_words,
    judge,
    mine,
    train_reranker,
)
from knowstore.training.checkpoints import read_checkpoint
from knowstore.training.reranker import _Run

PLACES = ("the river", "the sea", "a town", "the end", "it", "a king", "Rome", "the Tiber")
CONFIG = RerankerTrainingConfig(
    batch_size=4, encoder_rate=2e-3, head_rate=1e-2, warmup=2, n_held_out=3, n_candidates=3, validate_every=4, steps=8
)
Train = Callable[..., JointReranker]
Told = Callable[..., tuple[JointReranker, RerankerProgress]]


@pytest.fixture(scope="module")
def data() -> TrainingData:
    """24 passages of two sentences; a question is answered by the one that names Romulus, the other names the Rhône."""
    passages, questions = [], []
    for number in range(24):
        place = PLACES[number % 8]
        sentences = [f"Romulus founded {place} {number}.", f"Rhône lies on {place} {number}."]
        answering = number % 2
        if answering:
            sentences.reverse()
        text = " ".join(sentences)
        spans = ((0, len(sentences[0])), (len(sentences[0]) + 1, len(text)))
        passages.append(PassageInput("", text, spans))
        questions.append(QuestionRow("Who founded it?", (sentences[answering],), number, answering))
    return TrainingData(tuple(passages), tuple(questions))


def neighbours(data: TrainingData) -> Callable[[str], Sequence[int]]:
    """A search that finds every passage, in the order of the data."""
    return lambda question: list(range(len(data.passages)))


@pytest.fixture
def told(tiny_retriever_dir: Path, data: TrainingData, tmp_path: Path) -> Told:
    """A function that trains a new model into a folder of `tmp_path`, and gives the reranker and its last figures."""

    def run(
        settings: RerankerTrainingConfig,
        folder: str = "run",
        on_progress: Callable[[RerankerProgress], None] | None = None,
        rows: TrainingData = data,
    ) -> tuple[JointReranker, RerankerProgress]:
        torch.manual_seed(0)
        model = JointModel(load_base(tiny_retriever_dir))
        return train_reranker(model, rows, neighbours(rows), settings, tmp_path / folder, on_progress=on_progress)

    return run


@pytest.fixture
def train(told: Told) -> Train:
    """The same, for the reranker alone."""

    def run(*settings: Any, **options: Any) -> JointReranker:
        return told(*settings, **options)[0]

    return run


def test_a_planted_signal_is_learnt(train: Train, data: TrainingData) -> None:
    seen: list[RerankerProgress] = []
    trained = train(replace(CONFIG, steps=60, n_held_out=6, batch_size=8), on_progress=seen.append)
    assert seen[-1].loss < 0.8 * seen[0].loss
    assert seen[-1].sentence_accuracy == 1.0
    passage = data.passages[3]
    [score] = trained.score("Who founded it?", [RerankItem("", passage.text, passage.spans)])
    assert score.segment_scores[1] > score.segment_scores[0]
    assert trained.config.trained_steps == 60
    assert not trained.model.training


def test_loss_is_that_of_the_equation(tiny_retriever_dir: Path, data: TrainingData) -> None:
    model = JointModel(load_base(tiny_retriever_dir)).eval()
    run = _Run(model, data, neighbours(data), replace(CONFIG, n_negatives=2))
    run.dtype = torch.float32
    questions = run.train[:3]
    draw = random.Random(0)
    losses = run.losses(questions, draw)
    draw.seed(0)
    contrasts, golds, others, words = [], [], [], []
    for index in questions:
        row = data.questions[index]
        candidates = [row.passage, *draw.sample(run.negatives(index, 6), 2)]
        logits = [run_alone(model, row.question, data.passages[i]) for i in candidates]
        total = sum(math.exp(z) for passage in logits for z in passage)
        contrasts.append(-math.log(math.exp(logits[0][row.segment]) / total))
        z = [math.log(sum(map(math.exp, passage))) for passage in logits]
        golds.append(math.log(1 + math.exp(-z[0])))
        others += [math.log(1 + math.exp(value)) for value in z[1:]]
        passage = data.passages[row.passage]
        item = RerankItem(passage.title, passage.text, passage.spans)
        [score] = JointReranker(model, JointConfig(model.base.digest)).score(row.question, [item])
        start = passage.text.index(row.answers[0])
        stated = [z for first, last, z in score.word_scores if first < start + len(row.answers[0]) and last > start]
        words.append(z[0] - sum(stated) / len(stated))
    assert losses.contrast.item() == pytest.approx(sum(contrasts) / 3, abs=1e-5)
    assert losses.calibration.item() == pytest.approx(sum(golds) / 3 + sum(others) / 6, abs=1e-5)
    assert losses.words.item() == pytest.approx(sum(words) / 3, abs=1e-4)


def run_alone(model: JointModel, question: str, passage: PassageInput) -> list[float]:
    tokens = model.read_passages([(passage.title, passage.text, passage.spans)])[0]
    row: Tensor = model(model.batch([(model.read_questions([question])[0], tokens)]))[0]
    return [float(value) for value in row.tolist()]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(dropout: float, train: Train, tmp_path: Path) -> None:
    settings = replace(CONFIG, checkpoint_every_s=0.0, dropout=dropout)
    whole = train(settings, "whole")

    def stop(progress: RerankerProgress) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, "cut", stop)
    steps: list[int] = []
    resumed = train(settings, "cut", lambda progress: steps.append(progress.step))
    assert steps == [5, 6, 7, 8]
    assert resumed.config == whole.config
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert [file.suffix for file in sorted((tmp_path / "cut" / "checkpoint").iterdir())] == [".json", ".safetensors"]


def test_a_finished_run_is_not_trained_further(train: Train) -> None:
    steps: list[RerankerProgress] = []
    first = train(CONFIG)
    again = train(CONFIG, on_progress=steps.append)
    assert steps == []
    assert again.config == first.config
    state = again.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.model.state_dict().items())


def test_a_finished_run_tells_again_how_good_it_is(told: Told) -> None:
    seen: list[RerankerProgress] = []
    _, first = told(CONFIG, on_progress=seen.append)
    assert first == seen[-1]
    assert first.sentence_accuracy is not None
    _, again = told(CONFIG)
    assert again == first


@pytest.mark.parametrize("nothing", [{"steps": 0}, {"steps": None, "minutes": 0.0}])
def test_a_run_of_no_steps_is_refused(train: Train, tmp_path: Path, nothing: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="no time and no steps"):
        train(replace(CONFIG, **nothing))
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_run_that_time_ends_is_judged_by_its_last_weights(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock runs out a moment after the third step was found not to be the last, which no validation follows."""
    fractions = iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0])
    judged: list[Tensor] = []

    def judge_now(run: _Run) -> list[Judged]:
        judged.append(run.model.head.weight.detach().clone())
        return [Judged(torch.zeros(1, 1), torch.ones(1, dtype=torch.bool))]

    monkeypatch.setattr("knowstore.training.steps._fraction", lambda *_: next(fractions))
    monkeypatch.setattr(_Run, "judge", judge_now)
    trained, kept = told(replace(CONFIG, validate_every=2))
    assert kept.step == 3
    assert kept.sentence_accuracy == 1.0
    assert len(judged) == 2
    assert torch.equal(judged[-1], trained.model.head.weight)


def test_the_same_seed_gives_the_same_weights_and_the_embeddings_stay(train: Train, tiny_retriever_dir: Path) -> None:
    one, two, other = train(CONFIG, "one"), train(CONFIG, "two"), train(replace(CONFIG, seed=1), "other")
    weights = [reranker.model.head.weight for reranker in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    before = load_base(tiny_retriever_dir).model.state_dict()
    after = one.model.enc.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not any(name.startswith("embeddings.") for name in changed)


def test_dropout_is_of_the_seed_too_and_ends_with_the_training(train: Train, tiny_retriever_dir: Path) -> None:
    dropping = replace(CONFIG, dropout=0.3)
    one, two, without = train(dropping, "one"), train(dropping, "two"), train(CONFIG, "without")
    weights = [reranker.model.head.weight for reranker in (one, two, without)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    items = [RerankItem("", "Romulus founded Rome.", [(0, 21)])]
    assert one.score("Who founded it?", items) == one.score("Who founded it?", items)


def test_a_run_without_a_warmup_is_at_its_full_rate_at_once(train: Train, tmp_path: Path) -> None:
    train(replace(CONFIG, steps=1, warmup=0), "none")
    train(replace(CONFIG, steps=1, warmup=1), "one step")
    none, one = (load_file(tmp_path / run / "checkpoint" / "step-1.safetensors") for run in ("none", "one step"))
    assert all(torch.equal(tensor, one[name]) for name, tensor in none.items())


def test_the_log_holds_every_step_and_the_validations(train: Train, tmp_path: Path) -> None:
    train(replace(CONFIG, steps=6))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert [line["gold_first"] is not None for line in lines] == [False, False, False, True, False, True]


def test_a_checkpoint_of_other_settings_or_data_is_refused(train: Train, data: TrainingData) -> None:
    train(replace(CONFIG, steps=1))
    with pytest.raises(TrainingError, match="on other questions"):
        train(replace(CONFIG, steps=1), rows=replace(data, questions=data.questions[::-1]))
    with pytest.raises(TrainingError, match="a run with other settings"):
        train(replace(CONFIG, steps=1, head_rate=1e-3))


def test_fewer_questions_than_a_batch_are_refused(train: Train) -> None:
    with pytest.raises(TrainingError, match="questions on 24 passages to train on, a batch takes 40"):
        train(replace(CONFIG, batch_size=40))


def test_questions_whose_answer_is_cut_off_are_left_out(train: Train, data: TrainingData) -> None:
    def long(passage: PassageInput) -> PassageInput:
        before = "Rome " * 200
        spans = tuple((a + len(before), b + len(before)) for a, b in passage.spans)
        return PassageInput("", before + passage.text, spans)

    cut = TrainingData(tuple(map(long, data.passages)), data.questions)
    with pytest.raises(TrainingError, match="0 questions on 24 passages"):
        train(CONFIG, rows=cut)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(train: Train, tmp_path: Path) -> None:
    settings = replace(CONFIG, encoder_rate=1e30, head_rate=1e30, warmup=1, checkpoint_every_s=0.0)
    with pytest.raises(TrainingError, match=r"the loss is \S+ at step \d") as caught:
        train(settings)
    assert str(tmp_path / "run" / "checkpoint") in caught.value.kept
    assert (tmp_path / "run" / "checkpoint" / "run.json").exists()


def test_a_gradient_that_is_not_finite_ends_the_run_before_a_weight_is_changed(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = _Run.step_loss

    def step_loss(run: _Run, step: int, draw: random.Random) -> tuple[Tensor, float]:
        loss, nats = losses(run, step, draw)
        zero = loss - loss.detach()
        return loss + zero.abs().sqrt() if step == 2 else loss, nats  # whose value is finite, and its gradient is not

    monkeypatch.setattr(_Run, "step_loss", step_loss)
    with pytest.raises(TrainingError, match="the gradient's norm is nan at step 2"):
        train(replace(CONFIG, checkpoint_every_s=0.0))
    kept = read_checkpoint(tmp_path / "run" / "checkpoint")
    assert kept is not None
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())


def test_mined_passages_hold_no_answer_and_are_not_kept_out(data: TrainingData) -> None:
    row = QuestionRow("Who?", ("the RIVER", "a town"), 3, 0)
    found = mine(row, data, neighbours(data), 5, kept_out={1})
    assert found == [4, 5, 6, 7, 9]
    assert mine(row, data, lambda question: [3, 9, 9], 5) == [9]


def test_validation_passages_are_in_no_training_batch(tiny_retriever_dir: Path, data: TrainingData) -> None:
    run = _Run(JointModel(load_base(tiny_retriever_dir)), data, neighbours(data), CONFIG)
    assert len(run.held_out) == 3
    draw = random.Random(0)
    used = {data.questions[index].passage for step in range(10) for index in run.batch(step)}
    used |= {passage for index in run.train for passage in run._drawn(index, 9, draw)}
    assert not used & run.kept_out


def test_threshold_keeps_gold_passages_and_temperature_is_the_likeliest() -> None:
    torch.manual_seed(0)
    judged = []
    for _ in range(400):  # answers are drawn from the softmax of half the logits: temperature 2
        logits = 3 * torch.randn(1, 5)
        gold = torch.zeros(5, dtype=torch.bool)
        gold[torch.distributions.Categorical(logits=logits[0] / 2).sample()] = True
        judged.append(Judged(logits, gold))
    threshold, temperature = calibrate(judged)
    assert temperature == pytest.approx(2.0, rel=0.2)
    assert threshold is not None
    kept = [bool(torch.logsumexp(one.logits[0] / temperature, 0) >= threshold) for one in judged]
    assert sum(kept) / len(kept) == pytest.approx(0.95, abs=0.01)
    assert calibrate([]) == (None, 1.0)


def test_words_are_on_as_likely_as_their_weight_at_their_temperature() -> None:
    torch.manual_seed(0)
    words = []
    for _ in range(400):  # each word is on with the probability that its weight is at temperature 3
        logits = torch.cat([torch.zeros(1), -8 * torch.rand(9)])
        is_answer = torch.rand(10) < (logits / 3).exp()
        words.append((logits + 5 * torch.randn(1), is_answer))
    balanced = calibrate_words(words)
    literal = {}
    for temperature in (0.3, balanced, 30.0):
        losses = [
            -((logits - logits.max()) / temperature).exp().clamp(1e-6, 1 - 1e-6).log()[on].mean()
            - (1 - ((logits - logits.max()) / temperature).exp().clamp(1e-6, 1 - 1e-6)).log()[~on].mean()
            for logits, on in words
            if not on.all()
        ]
        literal[temperature] = float(torch.stack(losses).mean())
    assert min(literal, key=literal.__getitem__) == balanced
    assert 2.0 < balanced < 6.0
    assert calibrate_words([]) == 1.0


def test_a_reranker_without_negatives_learns_sentences_and_needs_no_search(
    tiny_retriever_dir: Path, data: TrainingData, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = JointModel(load_base(tiny_retriever_dir, n_shared=None))
    settings = replace(CONFIG, n_negatives=0, steps=12)
    seen: list[RerankerProgress] = []
    trained, _ = train_reranker(model, data, None, settings, tmp_path / "run", on_progress=seen.append)
    assert seen[-1].sentence_accuracy is not None
    assert seen[-1].gold_first is None
    assert trained.config.word_temperature != 1.0
    assert trained.config.null_threshold is None
    with pytest.raises(TrainingError):
        train_reranker(model, data, None, replace(CONFIG, n_negatives=1), tmp_path / "other")


def test_accuracies_count_sentences_and_passages() -> None:
    gold = torch.tensor([False, True])
    judged = [
        Judged(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), gold),
        Judged(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), gold),
    ]
    assert accuracies(judged) == (0.5, 0.5)


def test_weights_from_elsewhere_can_be_judged(tiny_retriever_dir: Path, data: TrainingData) -> None:
    judged = judge(JointModel(load_base(tiny_retriever_dir)), data, neighbours(data), range(5), n_candidates=4)
    assert [one.logits.shape[0] for one in judged] == [4] * 5
    assert [int(one.gold.nonzero()) for one in judged] == [row.segment for row in data.questions[:5]]


def test_search_over_passages_finds_words_and_meanings(tiny_retriever_dir: Path) -> None:
    texts = [("Rome", "Romulus founded it."), ("Lyon", "It lies on the Rhône."), ("Rome", "Romulus  founded it.")]
    with passage_search(Retriever.load(tiny_retriever_dir), texts) as search:
        assert search("Rhône")[0] == 1
        assert sorted(search("Who founded Rome?")) == [0, 1]
