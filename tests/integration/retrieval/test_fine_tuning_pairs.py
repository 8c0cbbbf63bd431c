"""Published rerankers are fine-tuned by Eq. 8, and what is written is read back as any of their class."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from knowstore.cli.app import app
from knowstore.errors import RetrievalError, TrainingError
from knowstore.experts import PassageInput
from knowstore.retrieval import CrossEncoderReranker, FlagReranker, RerankItem, load_pairs, load_reranker
from knowstore.training import PairTrainingConfig, QuestionRow, RerankerProgress, TrainingData, train_pairs
from knowstore.training.pairs import _Run

needs_flagembedding = pytest.mark.skipif(
    importlib.util.find_spec("FlagEmbedding") is None, reason="extra `rerank` is not installed"
)
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
CITIES = ("rome", "lyon", "the city", "rhône", "a city", "lyon city", "rome city", "the rhône")
CONFIG = PairTrainingConfig(
    batch_size=2, n_negatives=2, learning_rate=1e-2, warmup=2, n_held_out=2, n_candidates=4, validate_every=4, steps=12
)
KINDS = ("bge_reranker", "gemma_reranker")
LONG = ("when was rome founded", "rome was founded in 753 bc . " * 8)


@pytest.fixture
def base(request: pytest.FixtureRequest) -> Path:
    """The checkpoint whose fixture the test names."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="module")
def data() -> TrainingData:
    """Questions after a year, on passages that tell it; as many passages tell where the cities lie."""
    texts = [f"{city} was founded in 753 bc ." for city in CITIES] + [f"{city} lies on the rhône !" for city in CITIES]
    passages = [PassageInput("", text, ((0, len(text)),)) for text in texts]
    questions = [QuestionRow(f"when was {city} founded ?", ("753 bc",), n, 0) for n, city in enumerate(CITIES)]
    return TrainingData(tuple(passages), tuple(questions))


def everything(data: TrainingData) -> Callable[[str], Sequence[int]]:
    """A search that finds every passage, in the order of the data."""
    return lambda question: range(len(data.passages))


def fine_tuned(
    base: Path,
    data: TrainingData,
    folder: Path,
    config: PairTrainingConfig = CONFIG,
    on_progress: Callable[[RerankerProgress], None] | None = None,
    lora_rank: int = 0,
) -> Path:
    """Fine-tune a checkpoint into a folder."""
    torch.manual_seed(0)
    model = load_pairs(base)
    if lora_rank:
        model.use_lora(lora_rank)
    train_pairs(
        model, data, everything(data), config, folder / "training", base_digest=str(base), on_progress=on_progress
    )
    model.save(folder)
    return folder


@pytest.mark.parametrize("base", KINDS[:1], indirect=True)
def test_a_classifier_is_trained_on_the_logits_that_are_served(base: Path) -> None:
    pairs = [("when was rome founded", "rome"), LONG]
    served = [CrossEncoderReranker(base, max_tokens=24).logits(*pair[:1], [pair[1]])[0] for pair in pairs]
    assert load_pairs(base, max_tokens=24).logits(pairs).tolist() == pytest.approx(served, abs=1e-5)


@needs_flagembedding
@pytest.mark.parametrize("max_tokens", [24, 256])
def test_a_language_model_is_trained_on_the_logits_that_flagembedding_serves(
    gemma_reranker: Path, max_tokens: int
) -> None:
    pairs = [("when was rome founded", "rome"), LONG, ("who " * 30, "lyon lies on the rhône")]
    served = [
        FlagReranker(gemma_reranker, max_tokens=max_tokens).logits(question, [text])[0] for question, text in pairs
    ]
    model = load_pairs(gemma_reranker, max_tokens=max_tokens)
    model.model.eval()
    assert model.logits(pairs).tolist() == pytest.approx(served, abs=1e-5)


@pytest.mark.parametrize("base", KINDS, indirect=True)
def test_the_loss_is_that_of_the_gold_passage_among_its_negatives(base: Path, data: TrainingData) -> None:
    model = load_pairs(base)
    model.model.eval()
    run = _Run(model, data, everything(data), CONFIG, is_bfloat16=False)
    questions = run.train[:2]
    loss = run.loss(questions, random.Random("0"))
    draw, expected = random.Random("0"), 0.0
    for question in questions:
        wrong = run._negatives(question, draw)
        assert len(wrong) == 2
        assert all("753" not in data.passages[passage].text for passage in wrong)
        texts = [data.passages[passage].text for passage in (data.questions[question].passage, *wrong)]
        scores = model.logits([(data.questions[question].question, text) for text in texts])
        expected -= float(scores.log_softmax(0)[0].detach()) / 2
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


@needs_flagembedding
@pytest.mark.parametrize("base", KINDS, indirect=True)
def test_a_fine_tuned_reranker_orders_what_it_was_trained_to(base: Path, data: TrainingData, tmp_path: Path) -> None:
    seen: list[RerankerProgress] = []
    settings = replace(CONFIG, learning_rate=3e-2, steps=40)
    folder = fine_tuned(base, data, tmp_path / "tuned", settings, on_progress=seen.append)
    losses = [one.loss for one in seen]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    assert [one.gold_first is not None for one in seen] == [False, False, False, True] * 10
    assert seen[-1].gold_first == 1.0
    served = load_reranker("tuned", folder)
    assert isinstance(served, FlagReranker if base.name.startswith("gemma") else CrossEncoderReranker)
    items = [RerankItem("", one.text, one.spans) for one in data.passages]
    for reranker in (served, FlagReranker(folder)):
        scores = [score.score for score in reranker.score("when was the city founded ?", items)]
        assert min(scores[: len(CITIES)]) > max(scores[len(CITIES) :])
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}


@pytest.mark.parametrize("base", KINDS, indirect=True)
def test_fine_tuning_that_was_cut_off_ends_as_one_that_was_not(base: Path, data: TrainingData, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=6, checkpoint_every_s=0.0)
    whole = fine_tuned(base, data, tmp_path / "whole", config)

    def stop(progress: RerankerProgress) -> None:
        if progress.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tuned(base, data, tmp_path / "cut", config, stop)
    steps: list[int] = []
    cut = fine_tuned(base, data, tmp_path / "cut", config, lambda one: steps.append(one.step))
    assert steps == [4, 5, 6]  # the fourth was not kept any more
    first, second = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    with pytest.raises(TrainingError, match="a run with other settings, from another start"):
        fine_tuned(base, data, tmp_path / "cut", replace(config, seed=1))
    with pytest.raises(TrainingError, match="on other questions"):
        fine_tuned(base, replace(data, questions=data.questions[1:]), tmp_path / "cut", config)


def test_a_run_that_ends_by_the_clock_is_validated(
    gemma_reranker: Path, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("knowstore.training.steps.time.monotonic", lambda: now[0])

    def pass_time(progress: RerankerProgress) -> None:
        now[0] = 61.0 if progress.step == 2 else 0.0

    config = replace(CONFIG, steps=None, minutes=1.0)
    for call in ("the first", "one that finds the run ended"):
        model = load_pairs(gemma_reranker)
        kept = train_pairs(model, data, everything(data), config, tmp_path, on_progress=pass_time)
        assert kept.step == 2
        assert kept.gold_first is not None, call


@needs_peft
@pytest.mark.parametrize("base", KINDS, indirect=True)
def test_low_rank_updates_end_up_in_the_weights(base: Path, data: TrainingData, tmp_path: Path) -> None:
    model = load_pairs(base)
    model.use_lora(2)
    n_trained = sum(parameter.numel() for parameter in model.trained.values())
    assert n_trained < sum(parameter.numel() for parameter in model.model.parameters()) / 2
    train_pairs(model, data, everything(data), replace(CONFIG, steps=4), tmp_path / "training")
    pairs = [(data.questions[0].question, one.text) for one in data.passages[:3]]
    trained = model.logits(pairs).tolist()
    model.save(tmp_path)
    merged = load_pairs(tmp_path)
    merged.model.eval()
    assert merged.logits(pairs).tolist() == pytest.approx(trained, abs=1e-4)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_what_cannot_be_fine_tuned_is_refused(
    cross_encoder: Path, bert: Path, data: TrainingData, tmp_path: Path
) -> None:
    with pytest.raises(RetrievalError, match="BertModel"):
        load_pairs(bert)
    with pytest.raises(RetrievalError, match="cannot be read as a reranker of pairs"):
        load_pairs(tmp_path)
    model = load_pairs(cross_encoder)
    with pytest.raises(TrainingError, match="with 0 negatives"):
        train_pairs(model, data, everything(data), replace(CONFIG, n_negatives=0), tmp_path)
    with pytest.raises(TrainingError, match="a batch takes 40"):
        train_pairs(model, data, everything(data), replace(CONFIG, batch_size=40), tmp_path)
    with pytest.raises(TrainingError, match="no time and no steps"):
        train_pairs(model, data, everything(data), replace(CONFIG, steps=0), tmp_path)


def test_the_command_fine_tunes_what_base_names(
    gemma_reranker: Path, bge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [
        {"question": f"when was {city} founded ?", "answers": ["753 bc"],
         "passage": {"title": city, "text": f"{city} was founded in 753 bc ."}}
        for city in CITIES
    ]  # fmt: skip
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    how = ["train", "reranker", "--data", str(tmp_path / "qa.jsonl"), "--steps", "1", "--batch-size", "2"]
    models = ["--retriever", str(bge), "--device", "cpu", "--dtype", "float32"]
    output = tmp_path / "tuned"
    found = CliRunner().invoke(app, [*how, *models, "--base", str(gemma_reranker), "--output", str(output), "--json"])
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert (record["steps"], record["null_threshold"]) == (1, None)
    assert record["size_bytes"] == (output / "model.safetensors").stat().st_size
    assert (output / "tokenizer.json").exists()
    for wrong in (["--lora-rank", "2"], ["--batch-size", "0"], ["--n-negatives", "-1"]):
        refused = CliRunner().invoke(app, [*how, *models, *wrong, "--output", str(output)])
        assert refused.exit_code == 2, wrong
