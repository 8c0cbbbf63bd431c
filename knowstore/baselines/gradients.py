"""The gradient of a linear map's weights in its rank-one factors, and changes of weights that gradients pass through.

For y = W x with W (D, d), a loss over T tokens has the gradient  dL/dW = sum over t of delta_t u_t^T:  u_t (d,) is the
map's input at token t and delta_t (D,) the gradient at its output there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from knowstore.baselines.sequences import TokenRow, writing_loss
from knowstore.baselines.weights import hooked, inputs_of
from knowstore.experts import FrozenLLM


@dataclass(frozen=True)
class GradientFactors:
    """`u` (T, d) and `delta` (T, D) of one linear map."""

    u: Tensor
    delta: Tensor


def gradient_factors(llm: FrozenLLM, rows: Sequence[TokenRow], maps: Sequence[nn.Linear]) -> list[GradientFactors]:
    """The factors of the gradient of the rows' writing loss, of each map, in float32; tokens without one left out."""
    with _probed(maps) as probes, inputs_of(maps) as inputs, torch.enable_grad():
        loss = writing_loss(llm, rows)
        deltas = torch.autograd.grad(loss, [probe for [probe] in probes])
    out = []
    for [u], delta in zip(inputs, deltas, strict=True):
        acts = delta.abs().sum(-1) > 0  # (B, T); padding and the last token get none
        out.append(GradientFactors(u[acts].detach().float(), delta[acts].float()))
    return out


@contextmanager
def _probed(maps: Sequence[nn.Linear]) -> Iterator[list[list[Tensor]]]:
    """Add zeros that take gradients to what each map puts out: their gradient is that of the output."""
    probes: list[list[Tensor]] = [[] for _ in maps]

    def add(kept: list[Tensor], _args: Any, output: Tensor) -> Tensor:
        kept.append(torch.zeros_like(output, requires_grad=True))
        return output + kept[-1]

    with hooked(maps, [partial(add, kept) for kept in probes]):
        yield probes


@contextmanager
def changed_by(maps: Sequence[nn.Linear], changes: Sequence[Tensor]) -> Iterator[None]:
    """Let maps act as W + change, with gradients for the changes (D, d); the weights themselves stay."""

    def add(change: Tensor, args: Any, output: Tensor) -> Tensor:
        return output + linear(args[0], change.to(output.dtype))

    with hooked(maps, [partial(add, change) for change in changes]):
        yield
