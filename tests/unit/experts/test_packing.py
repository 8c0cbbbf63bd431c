"""Weights kept in blocks: the same numbers, and passes with gradients as before."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from knowstore.experts.packing import pack

Build = Callable[[str], PreTrainedModel]


@pytest.fixture(params=["llama", "phi"])  # without and with biases
def models(request: pytest.FixtureRequest, build: Build) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model in bfloat16, and the same packed."""
    plain = copy.deepcopy(build(request.param)).to(torch.bfloat16)
    packed = copy.deepcopy(plain)
    if not pack(packed):
        pytest.skip("this CPU does not compute in bfloat16")
    return plain, packed


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    out: Tensor = model(input_ids=ids).logits
    return out


@pytest.mark.parametrize("n_tokens", [1, 7, 90])
def test_a_packed_model_computes_the_same_to_the_bit(
    models: tuple[PreTrainedModel, PreTrainedModel], n_tokens: int
) -> None:
    plain, packed = models
    ids = torch.randint(3, 64, (2, n_tokens), generator=torch.Generator().manual_seed(3))
    assert torch.equal(logits(packed, ids), logits(plain, ids))


def test_gradients_pass_a_packed_model(models: tuple[PreTrainedModel, PreTrainedModel], token_ids: Tensor) -> None:
    gradients = []
    for model in models:
        x = model.get_input_embeddings()(token_ids).detach().requires_grad_(True)
        model(inputs_embeds=x).logits.float().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_packing_twice_changes_nothing(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    packed = models[1]
    before = {name: module.forward for name, module in packed.named_modules() if "forward" in vars(module)}
    assert pack(packed)
    assert before
    assert before == {name: module.forward for name, module in packed.named_modules() if "forward" in vars(module)}


def test_a_model_in_float32_stays_as_it_is(build: Build) -> None:
    model = copy.deepcopy(build("llama"))
    assert not pack(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_packed_model_follows_edits_of_its_weights(
    models: tuple[PreTrainedModel, PreTrainedModel], token_ids: Tensor, is_replaced: bool
) -> None:
    before = logits(models[0], token_ids)
    for model in models:
        logits(model, token_ids)
        edited = [module for module in model.modules() if isinstance(module, nn.Linear)][4]
        if is_replaced:
            edited.weight = nn.Parameter(edited.weight.detach() * 2, requires_grad=False)
        else:
            with torch.no_grad():
                edited.weight.mul_(2)
    plain, packed = models
    assert torch.equal(logits(packed, token_ids), logits(plain, token_ids))
    assert not torch.equal(logits(packed, token_ids), before)
