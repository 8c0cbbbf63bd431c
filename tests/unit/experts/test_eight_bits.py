"""Weights rounded to eight bits, and the query experts that single tokens are multiplied with in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from knowstore.experts import Experts, QueryExperts
from knowstore.experts.expert import query_output
from knowstore.experts.quantised import MOST_ROWS, EightBits

pytestmark = pytest.mark.skipif(
    not hasattr(torch, "_weight_int8pack_mm"), reason="this PyTorch has no eight-bit products"
)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 0.05, 30.0])
@pytest.mark.parametrize("shape", [(64, 576), (576, 64), (576, 16), (5, 48)])
def test_weights_in_eight_bits_are_off_by_half_a_step_at_most(shape: tuple[int, int], scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = scale * torch.randn(shape, generator=draw)
    weight[1] = 0.0
    rounded = EightBits.of(weight)
    assert rounded is not None
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded.codes * rounded.scales[:, None].float() - weight).abs() <= 0.76 * steps + 1e-37).all()
    assert EightBits.of(weight[:, :-1]) is None
    x = torch.randn(2, 2, shape[1], generator=draw).to(torch.bfloat16)
    expected = x.double() @ (rounded.codes * rounded.scales[:, None]).double().T
    norms = x.double().norm(dim=-1, keepdim=True) * weight.double().norm(dim=-1)
    assert rounded.product(x).shape == expected.shape
    assert ((rounded.product(x) - expected).abs() <= 2**-7 * norms + 1e-30).all()


def test_query_experts_in_eight_bits_serve_single_tokens_in_bfloat16_without_gradients() -> None:
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(64, 16, generator=draw), torch.randn(16, 64, generator=draw)
    query = QueryExperts((0,), (up,), (down,)).with_rounded()
    exact, rounded = Experts(query=replace(query, rounded=())), Experts(query=query)
    x = torch.randn(1, 1, 64, generator=draw).bfloat16()
    with torch.no_grad():
        expected, found = query_output(0, exact, x), query_output(0, rounded, x)
        assert not torch.equal(found, expected.to(found.dtype))
        assert (found - expected).norm() < 0.03 * expected.norm()
        for many in (x.expand(1, MOST_ROWS + 1, -1), x.expand(MOST_ROWS + 1, 1, -1), x.float()):
            assert torch.equal(query_output(0, rounded, many), query_output(0, exact, many))
        other = query.to(torch.device("cpu"), torch.float64)
        assert other.rounded is query.rounded
    assert torch.equal(query_output(0, rounded, x), query_output(0, exact, x))
