"""The reader's training: its loss is that of the whole prompt, it learns, and it takes over what is trained already."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from knowstore._answering import weigh
from knowstore.config import RetrievalConfig
from knowstore.encoders import load_base
from knowstore.errors import TrainingError
from knowstore.experts import (
    FrozenLLM,
    PassageInput,
    ReaderConfig,
    ReaderHypernetwork,
    TokensHypernetwork,
    load_hypernetwork,
    mount,
)
from knowstore.experts.expert import word_weights
from knowstore.prompts import passages_prompt
from knowstore.records import Hit
from knowstore.retrieval import JointConfig, JointModel, JointReranker, RerankItem
from knowstore.training import QuestionRow, TrainingConfig, TrainingData, TrainingProgress, train_hypernetwork
from knowstore.training.reader import ReaderRun
from knowstore.training.run import Batch, TokensRun


def new_reranker(network: TokensHypernetwork) -> JointReranker:
    """An untrained one."""
    torch.manual_seed(0)
    model = JointModel(load_base(network.config.base))
    return JointReranker(model, JointConfig(model.base.digest))


def test_the_loss_is_that_of_the_whole_prompt(
    tiny_llm: FrozenLLM, reader: ReaderHypernetwork, data: TrainingData
) -> None:
    run = ReaderRun(reader, tiny_llm, data, 6)
    batch = Batch([1, 2], [run.by_passage[1], run.by_passage[2]])
    for is_own, passages in ((True, (1, 2)), (False, (2, 1))):
        given = run.validated(batch, is_own=is_own)
        nats, n = 0.0, 0
        for position, question in batch.rows:
            asked, one = run.questions[question], data.passages[passages[position]]
            before = tiny_llm.prompt_ids(passages_prompt([(one.title, one.text)]))
            ids = torch.tensor([before + asked.ids])
            experts = reader.static_experts(tiny_llm)
            with torch.inference_mode(), mount(tiny_llm.model, experts, reader.config.layer, starts=[len(before)]):
                logits = tiny_llm.model(ids).logits[0]
            first = len(before) + asked.n_question
            nats += float(cross_entropy(logits[first - 1 : -1].float(), ids[0, first:], reduction="sum"))
            n += len(asked.ids) - asked.n_question
        assert run.answer_nats(batch, given) == pytest.approx(nats / n, abs=1e-4)


def test_a_reader_learns_beside_experts(
    tiny_llm: FrozenLLM, tiny_hypernetwork_dir: Path, reader: ReaderHypernetwork, data: TrainingData, tmp_path: Path
) -> None:
    beside = load_hypernetwork(tiny_hypernetwork_dir)
    assert isinstance(beside, TokensHypernetwork)
    reranker = new_reranker(beside)
    frozen = {name: tensor.clone() for name, tensor in beside.own_tensors().items()}
    seen: list[TrainingProgress] = []
    settings = TrainingConfig(
        batch_questions=8, learning_rate=2e-2, warmup=2, n_held_out=1, steps=30, validate_every=30
    )
    kept = train_hypernetwork(
        reader, tiny_llm, data, settings, tmp_path, reranker=reranker, beside=beside, on_progress=seen.append
    )
    losses = [progress.loss for progress in seen]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert kept.gold_em is not None
    assert all(bool(tensor.equal(frozen[name])) for name, tensor in beside.own_tensors().items())


def test_a_passage_is_served_among_those_of_its_title_first(tiny_llm: FrozenLLM, reader: ReaderHypernetwork) -> None:
    titles = ("Rome", "Rome", "Lyon", "Rome", "Oslo", "Rome", "", "")
    passages = tuple(PassageInput(title, f"It is {n}.", ((0, 8),)) for n, title in enumerate(titles))
    asked = tuple(QuestionRow("What is it?", (str(n),), n, 0) for n in range(8))
    run = ReaderRun(reader, tiny_llm, TrainingData(passages, asked), 6)
    run.train_on([0, 1, 2, 3, 4, 6, 7])
    batch = Batch([2, 0, 4, 6], [[2], [0], [4], [6]])
    found = [run._together(batch, 1, random.Random(seed)) for seed in range(60)]
    assert {len(some) for some in found} == {1, 2, 4}
    assert all(some.count(0) == 1 and len(set(some)) == len(some) for some in found)
    assert {some.index(0) for some in found if len(some) == 4} == {0, 1, 2, 3}
    assert all(set(some) & {1, 3} for some in found if len(some) == 2)  # of the same title where there are some,
    assert all(len(set(some) & {2, 4, 6}) == 1 for some in found if len(some) == 4)  # then others of the batch
    assert not any(5 in some for some in found)  # which is kept out
    for position in (0, 3):  # no other of this title, or no title
        served = {passage for seed in range(60) for passage in run._together(batch, position, random.Random(seed))}
        assert served == {2, 0, 4, 6}
    run._n_room = len(tiny_llm.prompt_ids(run._prompt([0, 1])))
    found = [run._together(batch, 1, random.Random(seed)) for seed in range(60)]
    assert {len(some) for some in found} == {1, 2}
    assert all(0 in some for some in found)


@pytest.mark.parametrize(("experts_share", "right_share"), [(0.0, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_beside_experts_one_passage_is_read(
    experts_share: float,
    right_share: float,
    tiny_llm: FrozenLLM,
    tiny_hypernetwork_dir: Path,
    reader: ReaderHypernetwork,
    data: TrainingData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = load_hypernetwork(tiny_hypernetwork_dir)
    assert isinstance(network, TokensHypernetwork)
    run = ReaderRun(reader, tiny_llm, data, 6, TokensRun(network, tiny_llm, data, 6, new_reranker(network)))
    monkeypatch.setattr("knowstore.training.reader._EXPERTS_SHARE", experts_share)
    monkeypatch.setattr("knowstore.training.reader._RIGHT_SHARE", right_share)
    batch = Batch([1, 2, 3], [run.by_passage[passage] for passage in (1, 2, 3)])
    served = [[1, 2], [3, 2, 1], [3]]
    monkeypatch.setattr(run, "_together", lambda batch, position, draw: served[position])
    read: list[list[int]] = []
    prompt = run._prompt
    monkeypatch.setattr(run, "_prompt", lambda passages: read.append(list(passages)) or prompt(passages))
    with torch.no_grad():
        run.losses(batch, random.Random(0), is_answering=True)
    if not experts_share:
        assert read == served
        return
    assert [len(some) for some in read] == [1, 1, 1]
    assert all(some[0] in of for some, of in zip(read, served, strict=True))
    is_right = [some == [passage] for some, passage in zip(read, batch.passages, strict=True)]
    assert is_right == ([True] * 3 if right_share else [False, False, True])  # the last is alone


def test_a_run_goes_on_beside_the_same_experts_alone(
    tiny_llm: FrozenLLM, tiny_hypernetwork_dir: Path, reader: ReaderHypernetwork, data: TrainingData, tmp_path: Path
) -> None:
    beside = load_hypernetwork(tiny_hypernetwork_dir)
    assert isinstance(beside, TokensHypernetwork)
    reranker = new_reranker(beside)
    with pytest.raises(TrainingError, match="no reranker to weigh the experts beside the prompt"):
        train_hypernetwork(reader, tiny_llm, data, TrainingConfig(steps=1), tmp_path, beside=beside)
    train_hypernetwork(reader, tiny_llm, data, TrainingConfig(steps=1), tmp_path, reranker=reranker, beside=beside)
    with torch.no_grad():
        beside.no_token.add_(1)
    with pytest.raises(TrainingError, match="other settings or models"):
        train_hypernetwork(reader, tiny_llm, data, TrainingConfig(steps=1), tmp_path, reranker=reranker, beside=beside)


def test_experts_beside_the_prompt_are_those_that_the_reranker_weighs(
    tiny_llm: FrozenLLM, tiny_hypernetwork_dir: Path, data: TrainingData
) -> None:
    network = load_hypernetwork(tiny_hypernetwork_dir)
    assert isinstance(network, TokensHypernetwork)
    reranker = new_reranker(network)
    run = TokensRun(network, tiny_llm, data, 6, reranker)
    question = run.by_passage[1][0]
    served = run.served([(question, [1, 0]), (question, [1])])
    assert served.neuron_weights is not None
    found = served.neuron_weights.view(2, 2, -1)
    asked = data.questions[question].question
    some = [data.passages[passage] for passage in (1, 0)]
    scores = reranker.score(asked, [RerankItem(one.title, one.text, one.spans) for one in some])
    hits = [
        Hit(str(n), one.title, one.text, "", "", 1, 0.0, s.score, one.spans, s.segment_scores, s.word_scores)
        for n, (one, s) in enumerate(zip(some, scores, strict=True))
    ]
    asked_with = weigh(hits, RetrievalConfig(null_threshold=None), reranker)
    for weights, one, passage in zip(found[0], asked_with, (1, 0), strict=True):
        tokens = run.passages[passage]
        expected = word_weights(tokens.places, one.word_weights)
        first = tokens.spans[0][0]
        assert weights[first : first + len(expected)].tolist() == pytest.approx(expected, rel=1e-2)
        assert len(set(expected)) > len(tokens.spans)  # of words, not of sentences
    assert float(found[1, 1].sum()) == 0.0


def test_a_reader_starts_from_what_it_shares_with_a_hypernetwork(
    tiny_llm: FrozenLLM, tiny_hypernetwork_dir: Path
) -> None:
    other = load_hypernetwork(tiny_hypernetwork_dir)
    assert other.static is not None
    assert other.query is not None
    sizes = ReaderConfig(tiny_llm.width, other.config.layer, static_rank=4, query_from=0, query_rank=4, n_blocks=3)
    fresh = ReaderHypernetwork(sizes)
    fresh.start_from(other)
    assert fresh.static is not None
    assert torch.equal(fresh.static.dw2, other.static.dw2)
    assert torch.equal(fresh.query_up[0], other.query.up[0])
    wider = ReaderHypernetwork(replace(sizes, query_rank=8, static_rank=5))
    before = [parameter.clone() for parameter in wider.parameters()]
    wider.start_from(other)
    assert all(torch.equal(old, new) for old, new in zip(before, wider.parameters(), strict=True))
