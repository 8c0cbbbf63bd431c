"""Weights that a GGUF file held in four bits are found again, and few rows are multiplied with them."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor, nn

from knowstore.experts import packing
from knowstore.experts.packing import pack
from knowstore.experts.quantised import MOST_ROWS, FourBits, is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="this PyTorch has no four-bit products")
N_OUT, N_IN = 48, 96


def weights(
    kind: GGMLQuantizationType, shape: tuple[int, int] = (N_OUT, N_IN), *, scale: float = 0.05, mean: float = 0.0
) -> Tensor:
    """Of a file of this type, in bfloat16."""
    drawn = np.random.default_rng(0).normal(mean, scale, shape).astype(np.float32)
    return torch.from_numpy(dequantize(quantize(drawn, kind), kind)).to(torch.bfloat16)


@torch.no_grad()
def packed(weight: Tensor, *, bias: bool = False) -> tuple[nn.Linear, nn.Module]:
    """A linear map, and a packed model that holds another with the same weights."""
    linear = nn.Linear(N_IN, N_OUT, bias=bias, dtype=torch.bfloat16)
    linear.weight.copy_(weight)
    model = nn.Sequential(nn.Linear(N_IN, N_OUT, bias=bias, dtype=torch.bfloat16)).requires_grad_(False)
    model.load_state_dict({f"0.{name}": tensor for name, tensor in linear.state_dict().items()})
    if not pack(model):
        pytest.skip("this CPU does not compute in bfloat16")
    return linear, model


@pytest.mark.parametrize("scale", [1e-3, 0.05, 30.0])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_products_are_as_close_as_those_in_bfloat16(scale: float, n_rows: int) -> None:
    weight = weights(GGMLQuantizationType.Q4_1, scale=scale)
    found = FourBits.found_in(weight)
    assert found is not None
    x = torch.randn(2, n_rows, N_IN, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = x.double() @ weight.double().T
    norms = x.double().norm(dim=-1, keepdim=True) * weight.double().norm(dim=-1)
    assert ((found.product(x) - expected).abs() <= 2**-8 * norms).all()


@pytest.mark.parametrize("mean", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(512, 2048), (80, 96), (1536, 576)])
def test_all_of_a_matrix_is_found(shape: tuple[int, int], mean: float) -> None:
    weight = weights(GGMLQuantizationType.Q4_1, shape, mean=mean)
    found = FourBits.found_in(weight)
    assert found is not None
    product = found.product(torch.eye(shape[1], dtype=torch.bfloat16)).T.float()
    assert float((product - weight.float()).abs().max()) <= 2**-7 * float(weight.float().abs().max())


def test_inputs_and_weights_may_be_parts_of_others() -> None:
    weight = weights(GGMLQuantizationType.Q4_1, (2 * N_OUT, N_IN)).T.contiguous().T[:N_OUT]
    found = FourBits.found_in(weight)
    assert found is not None
    x = torch.randn(2, 5, N_IN, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert torch.equal(found.product(x[:, -1:]), found.product(x[:, -1:].contiguous()))


@pytest.mark.parametrize("width", [0.005, 0.02, 0.03])
def test_weights_that_hardly_differ_are_not_taken_for_four_bits(width: float) -> None:
    drawn = torch.randn(N_OUT, N_IN, generator=torch.Generator().manual_seed(1))
    assert FourBits.found_in((1 + width * drawn).bfloat16()) is None


@pytest.mark.parametrize("odd", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_weights_that_are_no_numbers_are_left(odd: float) -> None:
    weight = weights(GGMLQuantizationType.Q4_1)
    weight[3, 40:42] = torch.tensor([odd, -odd])
    assert FourBits.found_in(weight) is None


def test_a_block_of_equal_weights_is_found() -> None:
    weight = weights(GGMLQuantizationType.Q4_1)
    weight[3, 32:64] = 0.0
    weight[5, :32] = 0.75
    found = FourBits.found_in(weight)
    assert found is not None
    product = found.product(torch.eye(N_IN, dtype=torch.bfloat16))
    assert torch.equal(product[32:64, 3], torch.zeros(32, dtype=torch.bfloat16))
    assert torch.equal(product[:32, 5], torch.full((32,), 0.75, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q5_1, GGMLQuantizationType.BF16])
def test_weights_of_another_kind_are_not_taken_for_four_bits(kind: GGMLQuantizationType) -> None:
    assert FourBits.found_in(weights(kind)) is None


def test_one_weight_that_is_off_is_seen() -> None:
    weight = weights(GGMLQuantizationType.Q4_1)
    place = int(weight[7, 64:].abs().argmin()) + 64
    weight[7, place] += (weight[7, 64:].max() - weight[7, 64:].min()) / 45  # a third of a step
    assert FourBits.found_in(weight) is None


def test_sizes_that_the_products_cannot_have_are_left() -> None:
    weight = weights(GGMLQuantizationType.Q4_1)
    assert FourBits.found_in(weight[:, :80]) is None
    assert FourBits.found_in(weight[:40]) is None


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_few_rows_are_multiplied_in_four_bits_and_many_as_before(bias: bool) -> None:
    linear, model = packed(weights(GGMLQuantizationType.Q4_1), bias=bias)
    x = torch.randn(1, MOST_ROWS, N_IN, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    few, many = model(x), model(x.repeat(2, 1, 1))
    assert torch.equal(many, linear(x.repeat(2, 1, 1)))
    assert few.shape == (1, MOST_ROWS, N_OUT)
    assert not torch.equal(few, many[:1])
    torch.testing.assert_close(few, many[:1], rtol=0.02, atol=0.02)


@torch.no_grad()
def test_four_bits_follow_edits_of_the_weights() -> None:
    _, model = packed(weights(GGMLQuantizationType.Q4_1))
    x = torch.ones(1, 1, N_IN, dtype=torch.bfloat16)
    before = model(x)
    model[0].weight.mul_(2)  # type: ignore[index]
    assert torch.equal(model(x), before * 2)
    model[0].weight[0] = 1.0  # type: ignore[index]
    assert float(model(x)[0, 0, 0]) == N_IN


@torch.no_grad()
def test_on_a_cpu_without_bfloat16_a_model_in_float32_has_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_computes_in_bf16", lambda: False)
    weight = weights(GGMLQuantizationType.Q4_1).float()
    linear = nn.Linear(N_IN, N_OUT)
    linear.weight.copy_(weight)
    model = nn.Sequential(nn.Linear(N_IN, N_OUT)).requires_grad_(False)
    model.load_state_dict({f"0.{name}": tensor for name, tensor in linear.state_dict().items()})
    assert pack(model)
    assert pack(model)
    x = torch.randn(1, MOST_ROWS, N_IN, generator=torch.Generator().manual_seed(2))
    few, many = model(x), model(x.repeat(2, 1, 1))
    assert torch.equal(many, linear(x.repeat(2, 1, 1)))
    assert few.dtype == torch.float32
    assert not torch.equal(few, many[:1])
    torch.testing.assert_close(few, many[:1], rtol=0.02, atol=0.02)
    assert not pack(nn.Sequential(nn.Linear(N_IN, N_OUT)))
    assert not pack(nn.Sequential(nn.Linear(N_IN, N_OUT, dtype=torch.bfloat16)))


@torch.no_grad()
def test_a_copy_of_a_packed_model_computes_the_same() -> None:
    _, model = packed(weights(GGMLQuantizationType.Q4_1))
    x = torch.ones(1, 6, N_IN, dtype=torch.bfloat16)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert torch.equal(twin(x[:, :2]), model(x[:, :2]))


@torch.no_grad()
def test_weights_that_were_edited_are_not_mixed_up_with_those_of_before_when_the_search_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, model = packed(weights(GGMLQuantizationType.Q4_1))
    x = torch.ones(1, 1, N_IN, dtype=torch.bfloat16)
    before = model(x)
    model[0].weight.mul_(-1)  # type: ignore[index]
    with monkeypatch.context() as context:
        context.setattr(FourBits, "found_in", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(x)
    torch.testing.assert_close(model(x), -before, rtol=0.02, atol=0.02)
