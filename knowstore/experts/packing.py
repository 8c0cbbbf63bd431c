"""Weights of a frozen LLM as the CPU's quickest products read them.

oneDNN brings a matrix into blocks before it multiplies with it. For a single token that costs more than the product,
and it is done anew at each call unless the blocks are kept. The products are the same to the bit. Of weights that a
file held in four bits, products with a few rows, as when an answer is written token by token, read those.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from knowstore.experts.quantised import MOST_ROWS, FourBits

_MOST_BYTES = 2 << 30
_OPS = torch.ops.mkldnn


def pack(model: nn.Module) -> bool:
    """Keep a blocked copy of every linear map's weights beside them, and one in four bits of those that were made from
    such; again it does nothing.

    Passes with gradients use the weights themselves. Weights that are edited in place or replaced are copied anew at
    the next call; only writes through `.data`, and those of fused optimizers, go unseen.

    Args:
        model: a frozen one; packed when it is on a CPU, its linear maps take at most 2 GiB, and it is in bfloat16 and
            oneDNN computes there in it. On a CPU that does not, one in float32 gets four-bit weights alone, with which
            few rows are multiplied in bfloat16, where its first map was made from such.

    Returns: whether the model is packed.
    """
    maps = [module for module in model.modules() if type(module) is nn.Linear]
    changed = [module.forward for module in maps if "forward" in vars(module)]
    if changed:
        return all(isinstance(forward, _PackedForward) for forward in changed)
    weights = [module.weight for module in maps]
    if not maps or sum(one.nbytes for one in weights) > _MOST_BYTES or not all(map(_can_pack, weights)):
        return False
    if not _is_blocked(weights[0]) and FourBits.found_in(weights[0].detach()) is None:
        return False
    made = [_PackedForward(module) for module in maps]
    for module, forward in zip(maps, made, strict=True):
        module.forward = forward  # type: ignore[method-assign, assignment]
    return True


@cache
def _computes_in_bf16() -> bool:
    """Whether this build of PyTorch has products with blocked weights, and this CPU computes in bfloat16."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return all(hasattr(_OPS, name) for name in names) and bool(_OPS._is_mkldnn_bf16_supported())


def _is_blocked(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and _computes_in_bf16()


def _can_pack(weight: Tensor) -> bool:
    """Whether it may have copies, and a change of it be noticed, which inference tensors do not tell."""
    usual = torch.bfloat16 if _computes_in_bf16() else torch.float32
    return weight.dtype == usual and weight.device.type == "cpu" and not weight.is_inference()


@dataclass(frozen=True)
class _Copies:
    """What is kept of a weight, and the state that it was in."""

    weight: Tensor
    state: tuple[int, int]
    blocked: Tensor | None
    four_bits: FourBits | None

    @classmethod
    def of(cls, weight: Tensor) -> _Copies:
        state = _state(weight)
        blocked = _OPS._reorder_linear_weight(weight.detach()) if _is_blocked(weight) else None
        return cls(weight, state, blocked, FourBits.found_in(weight.detach()))


class _PackedForward:
    """A linear map's forward pass, with copies of its weights; a copy of it begins without."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.copies: _Copies | None = _Copies.of(module.weight)

    def __getstate__(self) -> dict[str, object]:
        return {"module": self.module, "copies": None}

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.module.weight, self.module.bias
        if torch.is_grad_enabled() or x.dtype != weight.dtype:
            return linear(x, weight, bias)
        copies = self.copies
        if copies is None or copies.weight is not weight or copies.state != _state(weight):
            if not _can_pack(weight):
                return linear(x, weight, bias)
            copies = self.copies = _Copies.of(weight)
        if copies.four_bits is not None and x.numel() <= MOST_ROWS * x.shape[-1]:
            product = copies.four_bits.product(x.bfloat16()).to(x.dtype)
            return product if bias is None else product + bias
        if copies.blocked is None:
            return linear(x, weight, bias)
        out: Tensor = _OPS._linear_pointwise(x, copies.blocked, bias, "none", [], "")
        return out


def _state(weight: Tensor) -> tuple[int, int]:
    """Another one after every edit that PyTorch counts."""
    return weight.data_ptr(), weight._version
