"""A trained network that turns the gradient of a fact into an edit: what MEND and MALMEN share.

Of each token t the factors z_t = [u_t; delta_t] of `gradients` go, standardised, through two residual blocks of low
rank whose scales s and offsets o are each layer's own (Mitchell et al., 2022, section 3.1):

    h_t = z_t + ReLU(s_1 * (U_1 V_1 z_t + b_1) + o_1)
    [u~_t; delta~_t] = h_t + ReLU(s_2 * (U_2 V_2 h_t + b_2) + o_2)

U, b and o are zero at first, so that the untrained network hands on the gradient; the ReLU has a gradient at zero, or
they would stay so. How the tokens' edits become one change of a weight matrix is the method's rule: MEND sums them,
MALMEN solves for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from knowstore.baselines.gradients import GradientFactors


class Rule(Protocol):
    """How the edits of T tokens become one change (D, d) of a weight matrix."""

    def __call__(self, found: GradientFactors, edited: GradientFactors, rate: Tensor, damping: Tensor, /) -> Tensor:
        """`found` are the factors of the gradient, `edited` what the network made of them; `rate` and `damping` are
        the layer's own, trained, above 0."""
        ...


@dataclass(frozen=True)
class EditorShape:
    """Of `n_maps` weight matrices (D, d) the sizes, and the `rank` of the network's blocks."""

    n_maps: int
    d: int
    D: int
    rank: int = 64


class GradientEditor(nn.Module):
    """The network, one for all matrices of a shape; `mean` and `scale` (n_maps, d + D) standardise its input."""

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: EditorShape, *, rate: float = 3e-4, damping: float = 1.0) -> None:
        super().__init__()
        self.shape = shape
        width = shape.d + shape.D
        self.register_buffer("mean", torch.zeros(shape.n_maps, width))
        self.register_buffer("scale", torch.ones(shape.n_maps, width))
        self.down = nn.Parameter(torch.randn(2, width, shape.rank) / width**0.5)  # V
        self.up = nn.Parameter(torch.zeros(2, shape.rank, width))  # U
        self.bias = nn.Parameter(torch.zeros(2, width))  # b
        self.scales = nn.Parameter(torch.ones(shape.n_maps, 2, width))  # s
        self.offsets = nn.Parameter(torch.zeros(shape.n_maps, 2, width))  # o
        self.log_rate = nn.Parameter(torch.full((shape.n_maps,), rate).log())
        self.log_damping = nn.Parameter(torch.full((shape.n_maps,), damping).log())

    def standardise_on(self, samples: Sequence[Sequence[GradientFactors]]) -> None:
        """Set mean and scale from factors of some edits, each with those of all maps."""
        for place in range(self.shape.n_maps):
            z = torch.cat([torch.cat([one[place].u, one[place].delta], -1) for one in samples])  # (T, d + D)
            self.mean[place] = z.mean(0)
            self.scale[place] = z.std(0).clamp(min=1e-12)

    def transform(self, place: int, found: GradientFactors) -> GradientFactors:
        """The edit of each token for the `place`-th matrix."""
        h = (torch.cat([found.u, found.delta], -1) - self.mean[place]) / self.scale[place]
        for block in range(2):
            low = h @ self.down[block] @ self.up[block] + self.bias[block]
            h = h + (self.scales[place, block] * low + self.offsets[place, block]).clamp(min=0)
        return GradientFactors(h[:, : self.shape.d], h[:, self.shape.d :])

    def changes(self, found: Sequence[GradientFactors], rule: Rule) -> list[Tensor]:
        """The change (D, d) of each matrix."""
        return [
            rule(one, self.transform(place, one), self.log_rate[place].exp(), self.log_damping[place].exp())
            for place, one in enumerate(found)
        ]
