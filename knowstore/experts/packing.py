"""Weights of a frozen LLM in the order in which the CPU's bfloat16 products read them.

oneDNN brings a matrix into blocks before it multiplies with it. For a single token that costs more than the product,
and it is done anew at each call unless the blocks are kept. The products are the same to the bit. Of weights that a
file held in four bits, products with a few rows, as when an answer is written token by token, read those.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from knowstore.experts.quantised import MOST_ROWS, FourBits

_MOST_BYTES = 2 << 30
_OPS = torch.ops.mkldnn


def pack(model: nn.Module) -> bool:
    """Keep a blocked copy of every linear map's weights beside them, and one in four bits of those that were made from
    such; again it does nothing.

    Passes with gradients use the weights themselves. Weights that are edited in place or replaced are blocked anew at
    the next call; only writes through `.data` go unseen.

    Args:
        model: a frozen one; packed when it is in bfloat16 on a CPU, oneDNN computes there in it, and its linear maps
            take at most 2 GiB.

    Returns: whether the model is packed.
    """
    maps = [module for module in model.modules() if type(module) is nn.Linear]
    if any("forward" in vars(module) for module in maps):
        return all(isinstance(module.forward, _PackedForward) for module in maps)
    weights = [module.weight for module in maps]
    if not _is_useful() or sum(one.nbytes for one in weights) > _MOST_BYTES or not all(map(_can_pack, weights)):
        return False
    for module in maps:
        module.forward = _PackedForward(module)  # type: ignore[method-assign, assignment]
    return bool(maps)


def _is_useful() -> bool:
    """Whether this build of PyTorch has the products, and this CPU computes in bfloat16."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return all(hasattr(_OPS, name) for name in names) and bool(_OPS._is_mkldnn_bf16_supported())


def _can_pack(weight: Tensor) -> bool:
    """Whether it can be blocked, and a change of it be noticed, which inference tensors do not tell."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not weight.is_inference()


class _PackedForward:
    """A linear map's forward pass, with its weights in blocks."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self._pack(module.weight)

    def _pack(self, weight: Tensor) -> None:
        self.weight, self.state = weight, (weight.data_ptr(), weight._version)
        self.packed = _OPS._reorder_linear_weight(weight.detach())
        self.four_bits = FourBits.found_in(weight.detach())

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.module.weight, self.module.bias
        if torch.is_grad_enabled() or x.dtype != weight.dtype or not _can_pack(weight):
            return linear(x, weight, bias)
        if weight is not self.weight or (weight.data_ptr(), weight._version) != self.state:
            self._pack(weight)
        if self.four_bits is not None and x.numel() <= MOST_ROWS * x.shape[-1]:
            product = self.four_bits.product(x)
            return product if bias is None else product + bias
        out: Tensor = _OPS._linear_pointwise(x, self.packed, bias, "none", [], "")
        return out
