"""Signals beside Eq. 5: each is what its name says, and its gradient goes where it should."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from knowstore.errors import TrainingError
from knowstore.experts import (
    Experts,
    Factors,
    FrozenLLM,
    PassageInput,
    PooledConfig,
    PooledHypernetwork,
    ReaderHypernetwork,
    TokensHypernetwork,
    load_hypernetwork,
    mount,
)
from knowstore.experts.llm import pad_ids
from knowstore.prompts import passages_prompt
from knowstore.training import QuestionRow, TrainingConfig, TrainingData, TrainingProgress, train_hypernetwork
from knowstore.training.pooled import PooledRun
from knowstore.training.reader import ReaderTeacher
from knowstore.training.run import N_OPENING, Batch, PreparedQuestion, Run, TokensRun, window_of
from knowstore.training.signals import AnswerSteps, Signals, contrast_loss, distillation_loss, nothing_loss

WEIGHTS = ("distil_weight", "contrast_weight", "nothing_weight", "completion_weight")


@pytest.fixture
def tokens(tiny_hypernetwork_dir: Path) -> TokensHypernetwork:
    loaded = load_hypernetwork(tiny_hypernetwork_dir)
    assert isinstance(loaded, TokensHypernetwork)
    return loaded


def new_run(kind: str, tokens: TokensHypernetwork, llm: FrozenLLM, data: TrainingData) -> Run:
    torch.manual_seed(0)
    if kind == "tokens":
        return TokensRun(tokens, llm, data, 6)
    network = PooledHypernetwork(PooledConfig(llm.width, layer=1, rank=4, bottleneck=8))
    with torch.no_grad():  # experts of a new one add nothing, which no signal can change at first
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    return PooledRun(network, llm, data, 6)


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    torch.manual_seed(0)
    logits, taught = torch.randn(5, 7), torch.randn(5, 7).softmax(-1)
    every = torch.arange(7).expand(5, 7)
    expected = kl_div(logits.log_softmax(-1), taught, reduction="batchmean")
    assert distillation_loss(logits, every, taught).item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_loss(taught.log(), every, taught).item() == pytest.approx(0.0, abs=1e-6)
    shares, ids = taught.topk(2)
    certain = distillation_loss(logits, ids, shares / 2)  # shares are scaled to sum to 1
    assert certain.item() == pytest.approx(distillation_loss(logits, ids, shares).item(), rel=1e-5)


def test_contrast_is_the_choice_between_two_passages() -> None:
    own, other = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([1.0, 1.0], requires_grad=True)
    loss = contrast_loss(own, other)
    right = [0.5, math.exp(-3) / (math.exp(-3) + math.exp(-1))]
    assert loss.item() == pytest.approx(-sum(map(math.log, right)) / 2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert own.grad is not None
    assert other.grad is not None
    assert bool((own.grad > 0).all())
    assert bool((other.grad < 0).all())
    assert own.grad[1] > own.grad[0]  # the question that the wrong passage answers better weighs more


def test_doing_nothing_is_the_divergence_from_before() -> None:
    torch.manual_seed(0)
    logits, before = torch.randn(5, 7), torch.randn(5, 7)
    expected = kl_div(logits.log_softmax(-1), before.softmax(-1), reduction="batchmean")
    assert nothing_loss(logits, before).item() == pytest.approx(expected.item(), rel=1e-5)
    assert nothing_loss(before, before).item() == pytest.approx(0.0, abs=1e-6)


def test_the_nats_of_a_question_are_those_of_its_own_answer() -> None:
    torch.manual_seed(0)
    steps = AnswerSteps(torch.randn(5, 7), torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 0, 0, 1, 1]))
    each = steps.nats_each(2)
    assert steps.nats().item() == pytest.approx((3 * each[0].item() + 2 * each[1].item()) / 5, rel=1e-5)


def test_a_teacher_tells_what_the_reader_reads_in_the_prompt(
    tiny_llm: FrozenLLM, reader: ReaderHypernetwork, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = ReaderTeacher(reader, tiny_llm, data, n_best=3)
    rows = [(1, 1), (1, 2), (2, 3)]
    ids, shares = teacher.taught(rows)
    expected_ids, expected_shares = [], []
    for passage, question in rows:
        asked, one = teacher.run.questions[question], data.passages[passage]
        before = tiny_llm.prompt_ids(passages_prompt([(one.title, one.text)]))
        experts = reader.static_experts(tiny_llm)
        with torch.inference_mode(), mount(tiny_llm.model, experts, reader.config.layer, starts=[len(before)]):
            logits = tiny_llm.model(torch.tensor([before + asked.ids])).logits[0]
        best = logits[len(before) + asked.n_question - 1 : -1].softmax(-1).topk(3)
        expected_ids.append(best.indices)
        expected_shares.append(best.values)
    assert torch.equal(ids, torch.cat(expected_ids))
    torch.testing.assert_close(shares, torch.cat(expected_shares), rtol=2e-3, atol=1e-4)
    monkeypatch.setattr(teacher, "_ask", lambda batch: pytest.fail("a question was asked twice"))
    again, _ = teacher.taught(rows[1:])
    assert torch.equal(again, ids[-len(again) :])


@pytest.mark.parametrize("kind", ["tokens", "pooled"])
@pytest.mark.parametrize("name", ["distil", "contrast", "nothing", "completion"])
def test_a_step_against_its_gradient_lowers_a_signal(
    kind: str,
    name: str,
    tiny_llm: FrozenLLM,
    tokens: TokensHypernetwork,
    reader: ReaderHypernetwork,
    data: TrainingData,
) -> None:
    run = new_run(kind, tokens, tiny_llm, data)
    run.signals = replace(Signals(teacher=ReaderTeacher(reader, tiny_llm, data)), **{f"{name}_weight": 1.0})
    batch = Batch([1, 2, 3], [run.by_passage[passage] for passage in (1, 2, 3)])
    run.network.set_trainable()
    parameters = [parameter for parameter in run.network.parameters() if parameter.requires_grad]

    def signal() -> torch.Tensor:
        found = run.losses(batch, random.Random(0), is_answering=True).signals
        assert list(found) == [name]
        return found[name][1]

    before = signal()
    gradients = torch.autograd.grad(before, parameters, allow_unused=True)
    squared = sum(float(gradient.square().sum()) for gradient in gradients if gradient is not None)
    assert squared > 0
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter -= 0.01 * float(before) / squared * gradient
        assert float(signal()) < float(before)


@pytest.mark.parametrize("name", ["nothing", "completion"])
def test_signals_leave_what_belongs_to_no_passage_as_it_is(
    name: str, tiny_llm: FrozenLLM, tokens: TokensHypernetwork, data: TrainingData
) -> None:
    run = new_run("tokens", tokens, tiny_llm, data)
    run.signals = replace(Signals(), **{f"{name}_weight": 1.0})
    batch = Batch([1, 2], [run.by_passage[1], run.by_passage[2]])
    tokens.set_trainable()
    found = run.losses(batch, random.Random(0), is_answering=True).signals[name][1]
    found.backward()  # type: ignore[no-untyped-call]
    of_none = [p for name, p in tokens.named_parameters() if name.startswith(("static_parts", "query_"))]
    assert of_none
    assert all(parameter.grad is None for parameter in of_none)


def test_signals_count_with_their_weights_and_only_where_they_are_on(
    tiny_llm: FrozenLLM, tokens: TokensHypernetwork, data: TrainingData
) -> None:
    run = new_run("tokens", tokens, tiny_llm, data)
    batch = Batch([1, 2], [run.by_passage[1], run.by_passage[2]])
    plain = run.losses(batch, random.Random(0), is_answering=True)
    assert plain.signals == {}
    run.signals = Signals(contrast_weight=0.5, nothing_weight=2.0)
    both = run.losses(batch, random.Random(0), is_answering=True)
    extra = 0.5 * both.signals["contrast"][1] + 2.0 * both.signals["nothing"][1]
    assert float(both.total(1.0, 1.0)) == pytest.approx(float(plain.total(1.0, 1.0) + extra), rel=1e-4)
    assert run.losses(batch, random.Random(0), is_answering=False).signals == {}


def test_the_nothing_of_experts_that_add_nothing_is_zero(
    tiny_llm: FrozenLLM, tokens: TokensHypernetwork, data: TrainingData
) -> None:
    run = new_run("tokens", tokens, tiny_llm, data)
    run.signals = Signals(nothing_weight=1.0)
    batch = Batch([1, 2], [run.by_passage[1], run.by_passage[2]])
    questions = [run.questions[question] for _, question in batch.rows]
    ids = pad_ids([question.ids for question in questions])
    assert isinstance(run, TokensRun)
    static = run._experts(None, None, None)
    with mount(tiny_llm.model, static, tokens.config.layer):
        steps = run.answer_steps(questions, ids)
    found = run.further(batch, questions, ids, steps, lambda: static, lambda: ([], static))
    assert float(found["nothing"][1]) == pytest.approx(0.0, abs=1e-6)


def test_a_run_is_trained_by_the_signals_that_it_is_given(
    tiny_llm: FrozenLLM, tokens: TokensHypernetwork, reader: ReaderHypernetwork, data: TrainingData, tmp_path: Path
) -> None:
    seen: list[TrainingProgress] = []
    settings = TrainingConfig(steps=3, pointing_share=0.0, static_steps=1, n_held_out=0, **dict.fromkeys(WEIGHTS, 0.5))
    train_hypernetwork(tokens, tiny_llm, data, settings, tmp_path, teacher=reader, on_progress=seen.append)
    assert [one.distil is None for one in seen] == [True, False, False]  # the static expert is trained by Eq. 5 alone
    line = json.loads((tmp_path / "log.jsonl").read_text("utf-8").splitlines()[-1])
    assert all(line[name] > 0 for name in ("distil", "contrast", "nothing", "completion"))
    assert line["loss"] > line["answer"]
    with torch.no_grad():
        reader.query_up[0].add_(1)
    with pytest.raises(TrainingError, match="other settings or models"):
        train_hypernetwork(tokens, tiny_llm, data, settings, tmp_path, teacher=reader)


def test_signals_that_cannot_be_had_are_refused(
    tiny_llm: FrozenLLM, tokens: TokensHypernetwork, reader: ReaderHypernetwork, data: TrainingData, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="no reader to distil"):
        train_hypernetwork(tokens, tiny_llm, data, TrainingConfig(steps=1, distil_weight=1.0), tmp_path)
    with pytest.raises(TrainingError, match=r"trained by Eq\. 5 alone"):
        train_hypernetwork(reader, tiny_llm, data, TrainingConfig(steps=1, nothing_weight=1.0), tmp_path)
    with pytest.raises(TrainingError, match=r"trained by Eq\. 5 alone"):
        train_hypernetwork(reader, tiny_llm, data, TrainingConfig(steps=1, completion_weight=1.0), tmp_path)
    pooled = new_run("pooled", tokens, tiny_llm, data).network
    for network, n_mounted in ((tokens, 1), (pooled, 3)):
        with pytest.raises(TrainingError, match="n_mounted is"):
            train_hypernetwork(network, tiny_llm, data, TrainingConfig(steps=1, n_mounted=n_mounted), tmp_path)


@pytest.mark.parametrize("kind", ["tokens", "pooled"])
@pytest.mark.parametrize("first", [[], [5]])
def test_completion_is_the_likelihood_of_the_passages_own_words(
    kind: str,
    first: list[int],
    tiny_llm: FrozenLLM,
    tokens: TokensHypernetwork,
    data: TrainingData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = new_run(kind, tokens, tiny_llm, data)
    assert isinstance(run, TokensRun | PooledRun)
    run.signals = Signals(completion_weight=1.0)
    batch = Batch([1, 2], [run.by_passage[1], run.by_passage[2]])
    drawn: list[list[int]] = []

    def window(llm: FrozenLLM, ids: list[int], draw: random.Random) -> PreparedQuestion:
        drawn.append(list(ids))
        monkeypatch.setattr(FrozenLLM, "start_ids", first)
        return window_of(llm, ids, draw)

    monkeypatch.setattr(f"{type(run).__module__}.window_of", window)
    with torch.no_grad():
        found = run.losses(batch, random.Random(0), is_answering=True).signals["completion"][1]
        nats, n = 0.0, 0
        for ids, (position, _) in zip(drawn, batch.rows, strict=True):
            passage = batch.passages[position]
            assert tiny_llm.tokenizer.decode(ids).strip() in data.passages[passage].text
            with mount(tiny_llm.model, _completing(run, passage, ids), run.network.config.layer):
                logits = tiny_llm.model(torch.tensor([first + ids])).logits[0, len(first) + N_OPENING - 1 : -1]
            rest = torch.tensor(ids[N_OPENING:])
            nats += float(cross_entropy(logits.float(), rest, reduction="sum"))
            n += len(rest)
    assert float(found) == pytest.approx(nats / n, rel=1e-3)


def _completing(run: TokensRun | PooledRun, passage: int, ids: list[int]) -> Experts:
    """The passage's expert, all relevance on the sentence of these tokens, beside what is no passage's but the static
    expert."""
    if isinstance(run, PooledRun):
        four = run.network.factors(run.network.latents(run.means[[passage]]))
        parts = (four.up1, four.up2, four.dw1, four.dw2)
        return Experts(
            factors=Factors(*(part[:, None] for part in parts)), factor_weights=torch.ones(1, 1),
            max_norm=run.network.config.max_norm,
        )  # fmt: skip
    up, down = run._neurons([run.passages[passage]])
    weights = torch.zeros(1, up.shape[2])
    [(begin, end)] = [span for span in run.passages[passage].spans if run.passages[passage].ids[slice(*span)] == ids]
    weights[0, begin:end] = 1.0
    return Experts(
        up=up, down=down, neuron_weights=weights, query=run.network.query, max_norm=run.network.config.max_norm
    )


def test_short_sentences_are_not_completed(tiny_llm: FrozenLLM, tokens: TokensHypernetwork) -> None:
    short = PassageInput("", "Io", ((0, 2),))
    other = PassageInput("", "Po", ((0, 2),))
    asked = tuple(QuestionRow(f"Where {n}?", (one.text,), n, 0) for n, one in enumerate((short, other)))
    run = TokensRun(tokens, tiny_llm, TrainingData((short, other), asked), 6)
    run.signals = Signals(completion_weight=1.0)
    batch = Batch([0, 1], [[0], [1]])
    assert all(one.spans[0][1] - one.spans[0][0] <= N_OPENING for one in run.passages)
    tokens.set_trainable()
    _, nothing = run.losses(batch, random.Random(0), is_answering=True).signals["completion"]
    assert nothing.item() == 0.0  # every process of a run says as many losses
    nothing.backward()  # type: ignore[no-untyped-call]


def test_windows_are_stretches_whose_opening_is_given(tiny_llm: FrozenLLM) -> None:
    draw = random.Random(0)
    ids = list(range(200))
    starts = set()
    for _ in range(50):
        window = window_of(tiny_llm, ids, draw)
        starts.add(window.ids[0])
        assert window.ids == ids[window.ids[0] : window.ids[0] + 48]
        assert window.n_question == N_OPENING
    assert len(starts) > 20
    assert window_of(tiny_llm, ids[:6], draw).ids == ids[:6]


def test_experts_of_several_passages_are_mounted_together(
    tiny_llm: FrozenLLM, tokens: TokensHypernetwork, data: TrainingData
) -> None:
    run = TokensRun(tokens, tiny_llm, data, 6, n_mounted=3)
    batch = Batch([1, 2, 3], [run.by_passage[passage] for passage in (1, 2, 3)])
    own = torch.tensor([position for position, _ in batch.rows])
    mounted = [(own + k) % 3 for k in range(3)]
    T = max(len(run.passages[passage].ids) for passage in batch.passages)
    weights = run._served_weights(batch, mounted, T, random.Random(1)).view(len(batch.rows), 3, T)
    assert bool((weights.sum((1, 2)) > 0.5).all())
    assert float(weights[:, 2].max()) > 0
    asked_with: list[int] = []
    for n_mounted in (2, 3, 9):
        run.n_mounted = n_mounted
        with torch.no_grad():
            asked_with.append(
                round(1e6 * float(run.losses(batch, random.Random(0), is_answering=True).total(1.0, 1.0)))
            )
    assert asked_with[0] != asked_with[1] == asked_with[2]  # a batch has no more than its passages


def test_hard_negatives_are_of_the_same_title(tiny_llm: FrozenLLM) -> None:
    titles = ["A"] * 6 + ["B"] * 3 + ["C"] * 2 + ["D"] + [""] * 5
    passages = tuple(PassageInput(title, f"Number {n} lies away.", ((0, 10),)) for n, title in enumerate(titles))
    asked = tuple(QuestionRow(f"Where {n}?", (f"Number {n}",), n, 0) for n in range(len(titles)))
    network = PooledHypernetwork(PooledConfig(tiny_llm.width, layer=1, rank=4, bottleneck=8))
    run = PooledRun(network, tiny_llm, TrainingData(passages, asked), 6)
    run.lengths = [1 + n * 7 % 5 for n in range(len(titles))]
    run.has_hard_negatives = True
    batches = run.batches(range(len(titles)), "0", 30, 48, is_plain=False)
    assert sorted(p for batch in batches for p in batch.passages) == list(range(len(titles)))
    n_alike, n_grouped = 0, 0
    for batch in batches:
        for passage, [other] in zip(batch.passages, run.others(batch, 1), strict=True):
            alike = [titles[passage] == titles[p] != "" for p in batch.passages if p != passage]
            assert any(alike) == (titles[passage] == titles[batch.passages[other]] != "")
            n_alike, n_grouped = n_alike + any(alike), n_grouped + (titles[passage] in ("A", "B", "C"))
    assert n_alike >= n_grouped - 2 > 0  # a batch may end within a title
    plain = run.batches(range(len(titles)), "0", 30, 48)
    assert [one.passages for one in plain] != [one.passages for one in batches]
    run.has_hard_negatives = False
    assert run.others(plain[0], 2)[0] == [1, 2]


def test_a_run_is_told_how_experts_are_trained_together(
    tiny_llm: FrozenLLM, tiny_hypernetwork_dir: Path, data: TrainingData, tmp_path: Path
) -> None:
    alike = replace(data, passages=tuple(replace(one, title=f"T{n % 2}") for n, one in enumerate(data.passages)))
    losses = []
    for number, chosen in enumerate(({}, {"n_mounted": 3}, {"has_hard_negatives": True}, {"completion_weight": 1.0})):
        network = load_hypernetwork(tiny_hypernetwork_dir)
        plain = TrainingConfig(steps=1, pointing_share=0.0, static_steps=0, n_held_out=0, batches_per_step=2)
        settings = replace(plain, **chosen)
        kept = train_hypernetwork(network, tiny_llm, alike, settings, tmp_path / str(number), is_started=True)
        losses.append(round(kept.loss, 6))
    assert len(set(losses)) == 4
