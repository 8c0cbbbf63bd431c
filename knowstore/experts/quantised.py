"""Four-bit weights, found again in the weights of a model that a GGUF file held in four bits.

A single token's product with a matrix takes as long as reading the matrix does, and in four bits it is a quarter as
long. A file of type Q4_1 keeps blocks of 32 weights of a row as a lowest one and 15 equal steps up from it, of which
lowest and highest are always taken; so both can be told from the weights, and any other matrix does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ROWS = 4  # from about six on, products with blocked weights in bfloat16 are as quick
_BLOCK = 32
_STEPS = 15
_ROUNDING = 2**-9  # of a number in bfloat16, relative
_AT_ONCE = 1 << 18  # weights that are looked at together


@dataclass(frozen=True)
class FourBits:
    """A weight (O, I) as PyTorch's four-bit products on the CPU read it: `codes` in an order of their own, and
    `scales`, (I / 32, O, 2): of each block its step and the weight of code 8, in bfloat16."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def found_in(cls, weight: Tensor) -> FourBits | None:
        """The four-bit weights that a weight (O, I) was made from, by way of bfloat16; None when from others."""
        n_out, n_in = weight.shape
        if n_in % _BLOCK or n_out % 16 or not is_available():
            return None
        codes = torch.empty(n_out * n_in // _BLOCK, _BLOCK, dtype=torch.int32)
        scales = torch.empty(len(codes), 2, dtype=torch.bfloat16)
        n = _AT_ONCE // _BLOCK
        for first in range(0, len(codes), n):
            blocks = weight.view_as(codes)[first : first + n].float()
            low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)  # `aminmax` is slower than both
            step = (high - low) / _STEPS
            found = (blocks - low).div_(step.clamp(min=torch.finfo(torch.float32).tiny)).round_()
            differences = torch.addcmul(low, found, step).sub_(blocks).abs_()
            if (differences > 3 * _ROUNDING * torch.maximum(low.abs(), high.abs())).any():
                return None
            codes[first : first + n] = found
            scales[first : first + n, :1] = step
            middle = (low + high + step) / 2  # from there, a step that was rounded is wrong by least at both ends
            scales[first : first + n, 1:] = middle
        packed = torch._convert_weight_to_int4pack_for_cpu(codes.view(n_out, n_in), 2)
        return cls(packed, scales.view(n_out, n_in // _BLOCK, 2).transpose(0, 1).contiguous())

    def product(self, x: Tensor) -> Tensor:
        """`x` (..., I) times the transposed weight: (..., O); both in bfloat16."""
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor = torch._weight_int4pack_mm_for_cpu(rows, self.codes, _BLOCK, self.scales)
        return out.view(*x.shape[:-1], out.shape[-1])


def is_available() -> bool:
    """Whether this build of PyTorch has the products."""
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    return all(hasattr(torch, name) for name in names)
