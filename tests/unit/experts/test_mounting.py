"""Mounting on tiny random models: it adds Eq. 3's term, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from knowstore.errors import MountError
from knowstore.experts import Expert, Experts, FrozenLLM, QueryExperts, beside, combine, expert_output, mount
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
def test_states_are_the_inputs_of_the_ffn(name: str, build: Build, token_ids: Tensor) -> None:
    model = build(name)
    llm = FrozenLLM(model, None)  # type: ignore[arg-type]
    seen: list[Tensor] = []
    first, _ = ffn(model, LAYER)
    handle = first.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    bare = logits(model, token_ids)
    handle.remove()
    with torch.no_grad():
        states = llm.states(token_ids, LAYER)
        assert torch.equal(states, seen[0].reshape(states.shape))
        assert states.shape == (*token_ids.shape, llm.width)
        padded = torch.cat([token_ids, torch.zeros(2, 3, dtype=torch.long)], 1)
        torch.testing.assert_close(llm.states(padded, LAYER)[:, :7], states)
        with llm.watched(LAYER) as watched:
            assert torch.equal(logits(model, token_ids), bare)
        assert torch.equal(watched[0], states)
    assert torch.equal(logits(model, token_ids), bare)


def query_experts(width: int, layers: tuple[int, ...]) -> QueryExperts:
    """Random query experts of three neurons."""
    torch.manual_seed(4)
    up, down = ([torch.randn(shape) for _ in layers] for shape in ((width, 3), (3, width)))
    return QueryExperts(layers, tuple(up), tuple(down))


@pytest.mark.parametrize("name", NAMES)
def test_query_experts_stand_beside_the_ffns_below(name: str, build: Build, token_ids: Tensor) -> None:
    """Each adds ReLU(x up) down to the output of its own FFN, literally, and leaves no trace."""
    model = build(name)
    llm = FrozenLLM(model, None)  # type: ignore[arg-type]
    query = query_experts(llm.width, (0,))
    bare = logits(model, token_ids)
    first, last = ffn(model, 0)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    handles = [
        first.register_forward_pre_hook(lambda _module, args: inputs.append(args[0])),
        last.register_forward_hook(
            lambda _module, _args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        ),
    ]
    with torch.no_grad():
        logits(model, token_ids)
        handles[1].remove()
        with mount(model, Experts(query=query), LAYER):
            handles[1] = last.register_forward_hook(
                lambda _module, _args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
            )
            mounted = logits(model, token_ids)
    for handle in handles:
        handle.remove()
    assert torch.equal(inputs[0], inputs[1])
    added = (inputs[0] @ query.up[0]).clamp(min=0) @ query.down[0]
    torch.testing.assert_close(outputs[1], outputs[0] + added.reshape(outputs[0].shape))
    assert not torch.allclose(mounted, bare)
    assert torch.equal(logits(model, token_ids), bare)


def test_query_experts_spare_questions_without_experts_and_tokens_before_the_start(
    build: Build, token_ids: Tensor, make_expert: MakeExpert
) -> None:
    model = build("llama")
    query = query_experts(FrozenLLM(model, None).width, (0,))  # type: ignore[arg-type]
    bare = logits(model, token_ids)
    none = combine([[], [(make_expert(), 1.0, None)]], device=torch.device("cpu"), dtype=torch.float32, query=query)
    with mount(model, none, LAYER):
        mounted = logits(model, token_ids)
    assert torch.equal(mounted[0], bare[0])
    assert not torch.allclose(mounted[1], bare[1])
    both = combine([[(make_expert(), 1.0, None)]] * 2, device=torch.device("cpu"), dtype=torch.float32, query=query)
    with mount(model, both, LAYER, starts=[4, 4]):
        later = logits(model, token_ids)
    assert torch.equal(later[:, :4], bare[:, :4])
    assert not torch.allclose(later[:, 4:], bare[:, 4:])


def test_gradients_reach_mounted_experts_and_no_parameter_of_the_llm(
    build: Build, token_ids: Tensor, make_expert: MakeExpert
) -> None:
    llm = FrozenLLM(build("llama"), None)  # type: ignore[arg-type]
    query = query_experts(llm.width, (0,))
    experts = replace(experts_for([make_expert()], [make_expert()]), query=query)
    assert experts.down is not None
    for part in (experts.down, query.up[0]):
        part.requires_grad_()
    with mount(llm.model, experts, LAYER):
        llm.model(input_ids=token_ids).logits.sum().backward()
    for part in (experts.down, query.up[0]):
        assert part.grad is not None
        assert part.grad.any()
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


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_beside_an_ffn_is_added_as_an_expert_is(
    name: str, build: Build, make_expert: MakeExpert, token_ids: Tensor
) -> None:
    model, expert = build(name), make_expert()
    up, down = (expert.tensors[part].clone().requires_grad_() for part in ("up", "down"))
    with mount(model, experts_for([expert], [expert]), LAYER):
        wanted = logits(model, token_ids)
    with beside(model, LAYER, lambda x: torch.relu(x @ up) @ down):
        found = model(input_ids=token_ids).logits
        found.sum().backward()
    assert torch.allclose(found, wanted, atol=1e-5)
    assert up.grad is not None
    assert down.grad is not None
    assert torch.equal(logits(model, token_ids), logits(build(name), token_ids))
    with pytest.raises(MountError, match="layer 9"), beside(model, 9, lambda x: x):
        pass
