"""Mounting on tiny random models: it adds Eq. 3's term, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from knowstore.errors import MountError
from knowstore.experts import Expert, Experts, FrozenLLM, combine, expert_output, mount
from knowstore.experts.llm import blocks, ffn

LAYER, N_TOKENS = 1, 64
NAMES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "phi", "phi3", "opt", "gpt_neox", "mixtral",
         "qwen2_moe")  # fmt: skip
Build = Callable[[str], PreTrainedModel]
MakeExpert = Callable[..., Expert]


def experts_for(*questions: list[Expert]) -> Experts:
    weighted = [[(expert, 1 / len(question), None) for expert in question] for question in questions]
    return combine(weighted, device=torch.device("cpu"), dtype=torch.float32)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    out: Tensor = model(input_ids=ids).logits
    return out


class WrappedFFN(nn.Module):
    """FFN(x) + E(x) of Eq. 3, written out."""

    def __init__(self, inner: nn.Module, experts: Experts) -> None:
        super().__init__()
        self.inner, self.experts = inner, experts

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out + expert_output(self.experts, x.reshape(self.experts.n_questions, -1, x.shape[-1])).reshape(
            out.shape
        )


class WrappedOutput(nn.Module):
    """The same where a block holds both linear maps: W2(relu(W1 x)) + E(x), `x` seen by `first`."""

    def __init__(self, first: nn.Module, second: nn.Module, experts: Experts) -> None:
        super().__init__()
        self.second, self.experts = second, experts
        first.register_forward_hook(lambda _module, args, _out: setattr(self, "x", args[0]))

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.second(hidden)
        x = self.x.reshape(self.experts.n_questions, -1, self.x.shape[-1])
        return out + expert_output(self.experts, x).reshape(out.shape)


def literal_logits(model: PreTrainedModel, ids: Tensor, experts: Experts) -> Tensor:
    block = blocks(model)[LAYER]
    first, last = ffn(model, LAYER)
    name = next(name for name, child in block.named_children() if child is last)
    wrapped = WrappedFFN(last, experts) if first is last else WrappedOutput(first, last, experts)
    setattr(block, name, wrapped)
    try:
        return logits(model, ids)
    finally:
        setattr(block, name, last)
        first._forward_hooks.clear()


@pytest.mark.parametrize("name", NAMES)
def test_mounting_adds_the_experts_to_the_ffn_and_leaves_no_trace(
    name: str, build: Build, token_ids: Tensor, make_expert: MakeExpert
) -> None:
    model = build(name)
    experts = experts_for([make_expert(3, seed=1), make_expert(5, seed=2)], [make_expert(4, seed=3)])
    bare = logits(model, token_ids)
    hooks_before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with mount(model, experts, LAYER):
        mounted = logits(model, token_ids)
        with mount(model, experts, LAYER):
            twice = logits(model, token_ids)
        assert torch.equal(logits(model, token_ids), mounted)
    assert torch.equal(logits(model, token_ids), bare)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks_before
    assert (mounted - bare).abs().max() > 1e-2
    torch.testing.assert_close(mounted, literal_logits(model, token_ids, experts))
    assert not torch.allclose(twice, mounted)


@pytest.mark.parametrize("name", NAMES)
def test_an_exception_inside_leaves_no_trace(
    name: str, build: Build, token_ids: Tensor, make_expert: MakeExpert
) -> None:
    model = build(name)
    bare = logits(model, token_ids)
    with pytest.raises(IndexError), mount(model, experts_for([make_expert()]), LAYER):
        logits(model, token_ids + N_TOKENS)
    with (
        pytest.raises(MountError, match="3 sequences"),
        mount(model, experts_for([make_expert()], [make_expert()]), LAYER),
    ):
        logits(model, token_ids[[0, 1, 0]])
    assert torch.equal(logits(model, token_ids), bare)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_the_inputs_of_the_block_and_of_its_ffn(name: str, build: Build, token_ids: Tensor) -> None:
    model = build(name)
    llm = FrozenLLM(model, None)  # type: ignore[arg-type]
    seen: list[Tensor] = []
    first, _ = ffn(model, LAYER)
    handle = first.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        hidden = model(input_ids=token_ids, output_hidden_states=True).hidden_states
    handle.remove()
    entering, at_ffn = llm.states(token_ids, LAYER)
    assert torch.equal(entering, hidden[LAYER])
    assert torch.equal(at_ffn, seen[0].reshape(at_ffn.shape))
    assert entering.shape == at_ffn.shape == (*token_ids.shape, llm.width)
    padded = torch.cat([token_ids, torch.zeros(2, 3, dtype=torch.long)], 1)
    torch.testing.assert_close(llm.states(padded, LAYER)[1][:, :7], at_ffn)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_upper_blocks_fed_with_cached_states_give_the_final_states_of_the_model(
    name: str, layer: int, build: Build, token_ids: Tensor
) -> None:
    model = build(name)
    llm = FrozenLLM(model, None)  # type: ignore[arg-type]
    bare = logits(model, token_ids)
    with torch.no_grad():
        final = model(input_ids=token_ids, output_hidden_states=True).hidden_states[-1]
        cached, _ = llm.states(token_ids, layer)
        with llm.upper(layer) as upper:
            torch.testing.assert_close(upper(cached), final)
    assert torch.equal(logits(model, token_ids), bare)


def test_gradients_reach_mounted_experts_through_the_upper_blocks(
    build: Build, token_ids: Tensor, make_expert: MakeExpert
) -> None:
    llm = FrozenLLM(build("llama"), None)  # type: ignore[arg-type]
    experts = experts_for([make_expert()], [make_expert()])
    assert experts.down is not None
    experts.down.requires_grad_()
    cached, _ = llm.states(token_ids, LAYER)
    with llm.upper(LAYER) as upper, mount(llm.model, experts, LAYER):
        upper(cached).sum().backward()  # type: ignore[no-untyped-call]
    assert experts.down.grad is not None
    assert experts.down.grad.any()
    assert all(parameter.grad is None for parameter in llm.model.parameters())


def test_no_experts_change_nothing(build: Build, token_ids: Tensor, make_expert: MakeExpert) -> None:
    model = build("llama")
    bare = logits(model, token_ids)
    with mount(model, experts_for([], []), LAYER):
        assert torch.equal(logits(model, token_ids), bare)
    with mount(model, experts_for([], [make_expert()]), LAYER):
        mounted = logits(model, token_ids)
    assert torch.equal(mounted[0], bare[0])
    assert not torch.allclose(mounted[1], bare[1])


def test_a_batch_of_questions_gets_each_its_own_experts(
    build: Build, token_ids: Tensor, make_expert: MakeExpert
) -> None:
    model = build("llama")
    pair = [make_expert(3, seed=1)], [make_expert(6, seed=2), make_expert(1, seed=3)]
    with mount(model, experts_for(*pair), LAYER):
        together = logits(model, token_ids)
    for row, alone in enumerate(pair):
        with mount(model, experts_for(alone), LAYER):
            torch.testing.assert_close(together[row : row + 1], logits(model, token_ids[row : row + 1]))


def test_mounting_reaches_only_tokens_from_its_start(build: Build, token_ids: Tensor, make_expert: MakeExpert) -> None:
    for name in ("llama", "opt"):
        model = build(name)
        bare = logits(model, token_ids)
        with mount(model, experts_for([make_expert(16)], [make_expert(16)]), LAYER, starts=[3, 5]):
            mounted = logits(model, token_ids)
        for row, start in enumerate((3, 5)):
            assert torch.equal(mounted[row, :start], bare[row, :start])
            assert not torch.allclose(mounted[row, start], bare[row, start])


@pytest.mark.parametrize("layer", [-1, 3, 12])
def test_a_block_that_is_not_there_is_refused(layer: int, build: Build, make_expert: MakeExpert) -> None:
    with (
        pytest.raises(MountError, match="use a layer from 0 to 2"),
        mount(build("llama"), experts_for([make_expert()]), layer),
    ):
        pass


def test_experts_of_another_width_are_refused(build: Build, make_expert: MakeExpert) -> None:
    with pytest.raises(MountError, match="width 16 on a model of width 32"):
        mount(build("llama"), experts_for([make_expert(width=16)]), LAYER).__enter__()


def test_missing_starts_are_refused(build: Build, make_expert: MakeExpert) -> None:
    with pytest.raises(MountError, match="1 start positions for the experts of 2 questions"):
        mount(build("llama"), experts_for([make_expert()], [make_expert()]), LAYER, starts=[0]).__enter__()


def test_a_model_without_an_ffn_is_refused(build: Build) -> None:
    import copy

    model = copy.deepcopy(build("llama"))
    del blocks(model)[LAYER].mlp
    with pytest.raises(MountError, match="none is an FFN"):
        ffn(model, LAYER)
