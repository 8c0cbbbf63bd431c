"""Both hypernetworks: their equations, saving and loading, and passages of every kind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from knowstore.errors import HypernetworkError
from knowstore.experts import (
    Expert,
    FrozenLLM,
    Hypernetwork,
    Latent,
    PassageInput,
    PooledHypernetwork,
    TokensConfig,
    TokensHypernetwork,
    load_hypernetwork,
    load_llm,
)
from knowstore.experts.llm import pad_ids
from knowstore.experts.tokens import _places
from knowstore.prompts import question_prompt


@pytest.fixture(scope="module")
def tokens(tiny_hypernetwork_dir: Path) -> TokensHypernetwork:
    hypernetwork = load_hypernetwork(tiny_hypernetwork_dir)
    assert isinstance(hypernetwork, TokensHypernetwork)
    return hypernetwork


@pytest.fixture(scope="module")
def pooled(tiny_pooled_dir: Path) -> PooledHypernetwork:
    hypernetwork = load_hypernetwork(tiny_pooled_dir)
    assert isinstance(hypernetwork, PooledHypernetwork)
    return hypernetwork


@pytest.fixture(params=["tokens", "pooled"])
def hypernetwork(request: pytest.FixtureRequest) -> Hypernetwork:
    found: Hypernetwork = request.getfixturevalue(request.param)
    return found


def whole(text: str, title: str = "") -> PassageInput:
    """A passage of one sentence."""
    return PassageInput(title, text, ((0, len(text)),))


def assert_same(a: Expert, b: Expert) -> None:
    assert a.form == b.form
    assert a.segment_ranks == b.segment_ranks
    for name, tensor in a.tensors.items():
        torch.testing.assert_close(tensor, b.tensors[name], rtol=1e-4, atol=1e-4)


def test_pooled_is_the_literal_equation_4(
    pooled: PooledHypernetwork, tiny_llm: FrozenLLM, passage: PassageInput
) -> None:
    expert = pooled.generate(tiny_llm, [passage])[0]
    table = tiny_llm.model.get_input_embeddings().weight
    ids = tiny_llm.prompt_ids(f"{passage.title}. {passage.text}", is_start=False)
    mean = sum(table[index] for index in ids) / len(ids)
    state = {name: tensor.double() for name, tensor in pooled.state_dict().items()}
    inner = (state["inner.weight"] @ mean.double() + state["inner.bias"]).clamp(min=0)
    theta = (state["outer.weight"] @ inner + state["outer.bias"]).tolist()
    D, R = pooled.config.width, pooled.config.rank
    for name, (rows, columns) in {"up1": (D, R), "up2": (R, D), "dw1": (D, R), "dw2": (R, D)}.items():
        part, theta = theta[: rows * columns], theta[rows * columns :]
        literal = torch.tensor([part[row * columns : (row + 1) * columns] for row in range(rows)])
        torch.testing.assert_close(expert.tensors[name], literal, rtol=1e-4, atol=1e-5)
    assert not theta


def test_neurons_are_the_scores_that_training_compares(
    tokens: TokensHypernetwork, tiny_llm: FrozenLLM, passage: PassageInput
) -> None:
    """x up, as mounted, is the logit of each token less the threshold; a token's logit, term by term."""
    expert = tokens.generate(tiny_llm, [passage])[0]
    tokenised = tokens.tokenise(tiny_llm, passage)
    first = tokenised.spans[0][0]
    batch = tokens.tokens([tokenised], tokens.codes([tokenised]))
    keys, state = tokens.keys(tiny_llm, batch), tokens.state_dict()
    ids = tiny_llm.prompt_ids(question_prompt("Who founded Rome?"))
    x = tiny_llm.states(pad_ids([ids]), tokens.config.layer)
    scores = tokens.scores(x, keys)[0, -1, first:]
    table = tiny_llm.embeddings.double()
    white = state["whitener"].double() @ (x[0, -1].double() - state["x_mean"].double())

    def literal(t: int) -> float:
        word, before = (
            torch.nn.functional.layer_norm(table[tokenised.ids[i]], (tokens.config.width,)) for i in (t, t - 1)
        )
        key = state["key_code.weight"].double() @ batch.code[0, t].double() + state["key_code.bias"].double()
        key = key + state["key_word.weight"].double() @ word + state["key_before.weight"].double() @ before
        none = white @ state["no_token"].double() / 8 + state["key_bias"].double()
        return float(white @ key / 8 - none)

    expected = torch.tensor([literal(t) for t in range(first, len(tokenised.ids))])
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)
    const = float(x[0, -1] @ state["const"])
    offset = (expert.tensors["up"].T @ x[0, -1]) - scores + state["threshold"] * const
    drift = (const - 1) * (scores - x[0, -1] @ expert.tensors["up"]).abs()
    assert (offset.abs() <= drift.abs() + abs(const - 1) * 50 + 1e-3).all()


def test_a_token_knows_the_word_piece_that_holds_its_last_letter(
    tokens: TokensHypernetwork, tiny_llm: FrozenLLM, passage: PassageInput
) -> None:
    tokenised = tokens.tokenise(tiny_llm, passage)
    text = f"{passage.title}. " + " ".join(passage.text[first:last] for first, last in passage.spans)
    pieces = tokens.base.tokenizer(text, return_offsets_mapping=True)
    assert tokenised.piece_ids == pieces["input_ids"]
    reached = ""
    for token, piece in zip(tokenised.ids, tokenised.pieces, strict=True):
        reached += tiny_llm.tokenizer.decode([token])
        first, last = pieces["offset_mapping"][piece]
        if "\ufffd" not in reached and reached[-1] != " ":
            assert first < len(reached.lstrip()) <= last


def test_sentences_have_the_tokens_of_their_own_text(
    tokens: TokensHypernetwork, tiny_llm: FrozenLLM, passage: PassageInput
) -> None:
    tokenised = tokens.tokenise(tiny_llm, passage)
    for (first, last), (start, end) in zip(tokenised.spans, passage.spans, strict=True):
        assert tiny_llm.tokenizer.decode(tokenised.ids[first:last]) == " " + passage.text[start:end]
    expert = tokens.generate(tiny_llm, [passage])[0]
    assert expert.segment_ranks == tuple(last - first for first, last in tokenised.spans)


def test_each_neuron_stands_for_its_own_characters(
    tokens: TokensHypernetwork, tiny_llm: FrozenLLM, passage: PassageInput
) -> None:
    expert = tokens.generate(tiny_llm, [passage])[0]
    places = tokens.neuron_spans(tiny_llm, passage)
    assert len(places) == expert.rank
    ends = [sum(expert.segment_ranks[: n + 1]) for n in range(len(expert.segment_ranks))]
    for end, rank, (start, stop) in zip(ends, expert.segment_ranks, passage.spans, strict=True):
        own = places[end - rank : end]
        assert own[0][0] == start
        assert own[-1][1] == stop
        assert all(passage.text[a:b].strip() for a, b in own)


def test_blanks_stand_for_what_follows_and_bytes_for_their_character() -> None:
    # the tokens of " It 75 \U0001f600!": " It", " ", "7", "5", " ", three of the emoji's bytes, "!"
    sentence, ends = " It 75 \U0001f600!", [3, 4, 5, 6, 7, 8, 8, 8, 9]
    found = [sentence[a - 9 : b - 9] for a, b in _places(sentence, 9, ends)]
    assert found == ["It", " 7", "7", "5", " \U0001f600", "\U0001f600", "\U0001f600", "\U0001f600", "!"]
    assert _places(" 75", 0, [1, 2, 3]) == [(1, 2), (1, 2), (2, 3)]


def test_an_expert_does_not_depend_on_the_batch_it_was_made_in(
    hypernetwork: Hypernetwork, tiny_llm: FrozenLLM, passage: PassageInput
) -> None:
    others = [
        whole("Lyon."),
        whole("The river Rhône ends in the sea, and Romulus did not find it there at all.", "Lyon"),
    ]
    together = hypernetwork.generate(tiny_llm, [others[0], passage, others[1]])
    assert_same(together[1], hypernetwork.generate(tiny_llm, [passage])[0])
    assert_same(together[0], hypernetwork.generate(tiny_llm, [others[0]])[0])
    assert_same(together[2], hypernetwork.generate(tiny_llm, [others[1]])[0])


def test_experts_for_a_model_in_bfloat16_are_close_and_kept_exact(
    tokens: TokensHypernetwork, tiny_llm: FrozenLLM, tiny_llm_dir: Path
) -> None:
    passages = [whole("Lyon lies in France."), whole("The river Rhone flows there, and the Saone.")]
    latents = tokens.encode(tiny_llm, passages)
    exact = tokens.materialise(tiny_llm, latents)
    rounded = tokens.materialise(load_llm(tiny_llm_dir, dtype=torch.bfloat16), latents)
    for a, b in zip(exact, rounded, strict=True):
        for name, tensor in a.tensors.items():
            assert b.tensors[name].dtype == torch.float32
            assert (b.tensors[name] - tensor).norm() < 0.02 * tensor.norm()


def test_a_passage_without_text_beside_others_has_an_expert_without_neurons(
    tokens: TokensHypernetwork, tiny_llm: FrozenLLM
) -> None:
    empty, other = tokens.generate(tiny_llm, [PassageInput("", "", ()), whole("Lyon")])
    assert (empty.rank, other.rank > 0) == (0, True)


@pytest.mark.parametrize("title", ["", "Lyon"])
def test_some_neurons_of_an_expert_can_be_made_alone(
    tokens: TokensHypernetwork, tiny_llm: FrozenLLM, title: str
) -> None:
    passages = [PassageInput(title, "It is old. It lies in France.", ((0, 10), (11, 29))), whole("Lyon")]
    latents = tokens.encode(tiny_llm, passages)
    experts = tokens.materialise(tiny_llm, latents)
    chosen = [0, 5, 2], []
    parts = [tokens.part(latent, some) for latent, some in zip(latents, chosen, strict=True)]
    for expert, made, some in zip(experts, tokens.materialise(tiny_llm, parts), chosen, strict=True):
        expected = expert.part(some)
        assert made.segment_ranks == expected.segment_ranks == (len(some),)
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(made.tensors[name], tensor, rtol=1e-5, atol=1e-5)


def test_different_passages_get_different_experts(hypernetwork: Hypernetwork, tiny_llm: FrozenLLM) -> None:
    a, b = hypernetwork.generate(tiny_llm, [whole("Romulus did."), whole("Romulus did not.")])
    assert any(
        a.tensors[n].shape != b.tensors[n].shape or not torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors
    )


def test_experts_are_linear_in_their_latents(
    hypernetwork: Hypernetwork, tiny_llm: FrozenLLM, passage: PassageInput
) -> None:
    latent = hypernetwork.encode(tiny_llm, [passage])[0]
    linear = ("key", "code", "latent")
    other = Latent(
        {n: torch.randn_like(t) if n in linear else t for n, t in latent.tensors.items()}, latent.segment_ranks
    )
    middle = Latent(
        {n: (t + other.tensors[n]) / 2 if n in linear else t for n, t in latent.tensors.items()}, latent.segment_ranks
    )
    a, b, between = hypernetwork.materialise(tiny_llm, [latent, other, middle])
    for name, tensor in between.tensors.items():
        torch.testing.assert_close(tensor, (a.tensors[name] + b.tensors[name]) / 2, rtol=1e-4, atol=1e-3)


def test_latents_say_the_rank_of_each_segment(
    hypernetwork: Hypernetwork, tiny_llm: FrozenLLM, passage: PassageInput
) -> None:
    latents = hypernetwork.encode(tiny_llm, [passage, whole("Lyon")])
    experts = hypernetwork.materialise(tiny_llm, latents)
    assert [latent.segment_ranks for latent in latents] == [expert.segment_ranks for expert in experts]
    assert all(tensor.device.type == "cpu" for latent in latents for tensor in latent.tensors.values())
    assert all(tensor.dtype == torch.float32 for expert in experts for tensor in expert.tensors.values())


@pytest.mark.parametrize(
    "odd",
    [
        whole("x"),
        whole("Romulus did.", ""),
        whole("羅馬建於公元前753年。 🏛️ Ψ e\u0301 \u200d"),
        whole("\ud7ff\u0000\u0007 \ufffd"),
        whole("Rome<|im_end|><|im_start|>system", "<|endoftext|>"),
        whole("Romulus did. " * 60),
        whole("Romulus.", "A title without an end " * 60),
        PassageInput("Rome", "Rome. Rome!", ((0, 5), (5, 5), (6, 11))),
    ],
    ids=[
        "one letter",
        "no title",
        "unicode",
        "control letters",
        "control tokens",
        "long",
        "long title",
        "empty sentence",
    ],
)
def test_odd_passages_give_finite_experts(odd: PassageInput, hypernetwork: Hypernetwork, tiny_llm: FrozenLLM) -> None:
    expert, beside = hypernetwork.generate(tiny_llm, [odd, whole("Lyon lies on the Rhône.")])
    assert all(bool(tensor.isfinite().all()) for tensor in expert.tensors.values())
    assert expert.rank > 0
    assert_same(beside, hypernetwork.generate(tiny_llm, [whole("Lyon lies on the Rhône.")])[0])


def test_sentences_past_the_most_tokens_have_rank_0(tokens: TokensHypernetwork, tiny_llm: FrozenLLM) -> None:
    sentence = "The river Rhône ends in the sea. "
    text = sentence * 20
    spans = tuple((n * len(sentence), (n + 1) * len(sentence) - 1) for n in range(20))
    tokenised = tokens.tokenise(tiny_llm, PassageInput("Lyon", text, spans))
    assert len(tokenised.ids) == tokens.config.max_tokens
    assert tokenised.spans[-1] == (len(tokenised.ids), len(tokenised.ids))
    expert = tokens.generate(tiny_llm, [PassageInput("Lyon", text, spans)])[0]
    assert len(expert.segment_ranks) == 20
    assert expert.segment_ranks[0] > 0
    assert expert.segment_ranks[-1] == 0


def test_control_tokens_in_a_passage_are_text(tokens: TokensHypernetwork, tiny_llm: FrozenLLM) -> None:
    ids = tokens.tokenise(tiny_llm, whole("Rome<|im_end|><|endoftext|>", "<|im_start|>system")).ids
    assert not set(ids) & set(tiny_llm.tokenizer.all_special_ids)


def test_saving_and_loading_keeps_every_bit(hypernetwork: Hypernetwork, tmp_path: Path) -> None:
    hypernetwork.save(tmp_path / "a")
    again = load_hypernetwork(tmp_path / "a")
    assert again.config == hypernetwork.config
    assert {n: t.dtype for n, t in again.state_dict().items()} == {
        n: t.dtype for n, t in hypernetwork.state_dict().items()
    }
    assert all(torch.equal(t, hypernetwork.state_dict()[name]) for name, t in again.state_dict().items())
    assert again.fingerprint() == hypernetwork.fingerprint()
    again.save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in again.parameters())


def test_weights_kept_in_bfloat16_come_back_as_float32(hypernetwork: Hypernetwork, tmp_path: Path) -> None:
    hypernetwork.save(tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    again = load_hypernetwork(tmp_path)
    for name, tensor in again.own_tensors().items():
        assert torch.equal(tensor, hypernetwork.own_tensors()[name].to(torch.bfloat16).float())


def test_fingerprints_follow_weights_and_config(
    tokens: TokensHypernetwork, pooled: PooledHypernetwork, tmp_path: Path
) -> None:
    assert tokens.fingerprint() != pooled.fingerprint()
    pooled.save(tmp_path)
    other = load_hypernetwork(tmp_path)
    other.config = replace(other.config, layer=2)
    assert other.fingerprint() != pooled.fingerprint()
    other.config = replace(pooled.config, notes="answers half of the questions")
    assert other.fingerprint() == pooled.fingerprint()
    with torch.no_grad():
        other.inner.weight[0, 0] += 1e-6
    assert other.fingerprint() != pooled.fingerprint()


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(folder: Path, tensor: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["log_value"] = tensor
    save_file(weights, folder / "model.safetensors")


BROKEN = {
    "no folder": shutil.rmtree,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "pickled weights": lambda folder: torch.save({}, folder / "model.safetensors"),
    "cut weights": lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"),
    "weights that are NaN": lambda folder: change_weights(folder, torch.tensor(torch.nan)),
    "weights that are infinite": lambda folder: change_weights(folder, torch.tensor(torch.inf)),
    "weights of another shape": lambda folder: change_weights(folder, torch.zeros(2)),
    "config that is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "config that is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config that is nested too deep": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "config in another encoding": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"),
    "huge config": lambda folder: change_config(folder, notes="x" * (1 << 20)),
    "unknown kind": lambda folder: change_config(folder, kind="pickle"),
    "other kind": lambda folder: change_config(folder, kind="pooled"),
    "unknown field": lambda folder: change_config(folder, colour="red"),
    "huge sizes": lambda folder: change_config(folder, width=1 << 23, vocabulary=1 << 23),
    "sizes past all bounds": lambda folder: change_config(folder, width=1 << 60),
    "no width": lambda folder: change_config(folder, code_width=0),
    "another encoder": lambda folder: change_config(folder, base_digest="0" * 16),
    "no encoder": lambda folder: change_config(folder, base="nowhere"),
    "negative layer": lambda folder: change_config(folder, layer=-1),
    "size that is text": lambda folder: change_config(folder, width="32"),
    "bound that is NaN": lambda folder: change_config(folder, max_norm=float("nan")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_holds_no_hypernetwork_is_refused(name: str, tiny_hypernetwork_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hypernetwork"
    shutil.copytree(tiny_hypernetwork_dir, folder)
    BROKEN[name](folder)
    with pytest.raises(HypernetworkError, match="holds no hypernetwork that can be read") as caught:
        load_hypernetwork(folder)
    assert caught.value.__cause__ is not None


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(HypernetworkError, match="width is 0"):
        TokensConfig(width=0)
    with pytest.raises(HypernetworkError, match="max_norm is -1"):
        TokensConfig(width=8, max_norm=-1.0)
