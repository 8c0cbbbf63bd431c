"""Weights in four and in eight bits, for products with single tokens, which take as long as reading the weights does.

Those in four bits are found again in the weights of a model that a GGUF file held in four bits. A file of type Q4_1
keeps blocks of 32 weights of a row as a lowest one and 15 equal steps up from it, of which its writer takes the lowest
and the highest in every block; so both can be told from the weights. Those in eight bits are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ROWS = 4  # from about six on, products with blocked weights in bfloat16 are as quick
_BLOCK = 32
_STEPS = 15
_INT8_ROW = 16
_ROUNDING = 2**-8  # of a number in bfloat16, relative, at most
_ROWS = 64  # that PyTorch puts in order together
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
        if not n_out or not n_in or n_in % _BLOCK or n_out % 16 or not is_available():
            return None
        n = max(1, _AT_ONCE // (n_in * _ROWS)) * _ROWS
        codes, scales = [], []
        for first in range(0, n_out, n):
            fitted = _fitted(weight[first : first + n])
            if fitted is None:
                return None
            codes.append(torch._convert_weight_to_int4pack_for_cpu(fitted[0], 2))
            scales.append(fitted[1])
        return cls(torch.cat(codes), torch.cat(scales, 1))

    def product(self, x: Tensor) -> Tensor:
        """`x` (..., I) times the transposed weight: (..., O); both in bfloat16."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out: Tensor = torch._weight_int4pack_mm_for_cpu(rows, self.codes, _BLOCK, self.scales)
        return out.view(*x.shape[:-1], out.shape[-1])


def _fitted(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes (N, I) and scales (I / 32, N, 2) of N rows; None where one is further off than rounding explains, or
    as far as a quarter of a step."""
    blocks = rows.float().reshape(-1, _BLOCK)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)  # `aminmax` is slower than both
    step = (high - low) / _STEPS
    codes = ((blocks - low) / step.clamp(min=torch.finfo(torch.float32).tiny)).round_()
    differences = torch.addcmul(low, codes, step).sub_(blocks).abs_()
    rounding = 2.05 * _ROUNDING * torch.maximum(low.abs(), high.abs())  # of an end of the block and of the weight
    if not (differences <= torch.minimum(rounding, step / 4)).all():
        return None
    middle = (low + high + step) / 2  # from there, a step that was rounded is wrong by least at both ends
    scales = torch.cat([step, middle], 1).bfloat16().view(len(rows), -1, 2)
    return codes.int().view(len(rows), -1), scales.transpose(0, 1)


@dataclass(frozen=True)
class EightBits:
    """A weight (O, I) rounded to eight bits: `codes` from -127 to 127, and of each row its step in `scales` (O,), in
    bfloat16."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> EightBits | None:
        """The nearest ones; None where this build of PyTorch has no product with them, or none that is right: that
        reads past the end of rows that are no multiple of 16 long."""
        is_cpu = weight.device.type == "cpu"
        if not hasattr(torch, "_weight_int8pack_mm") or not is_cpu or weight.shape[1] % _INT8_ROW:
            return None
        rows = weight.detach().float()
        scales = (rows.abs().amax(1) / 127).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        codes = (rows / scales.float()[:, None]).round_().clamp_(-127, 127)
        return cls(codes.to(torch.int8).contiguous(), scales)

    def product(self, x: Tensor) -> Tensor:
        """`x` (..., I) times the transposed weight: (..., O); both in bfloat16."""
        out: Tensor = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]).contiguous(), self.codes, self.scales)
        return out.view(*x.shape[:-1], out.shape[-1])


def is_available() -> bool:
    """Whether this build of PyTorch has the products with four bits."""
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    return all(hasattr(torch, name) for name in names)
