"""The `reader`: a hypernetwork that makes nothing of a passage, for passages that are read in the prompt.

It is the static expert and query experts alone, the latter in blocks above the mount layer as well: what teaches the
frozen LLM to answer briefly from passages in its prompt. They act from the question on, so that passages are read by
the LLM as it is. It is the fair opponent of experts, for reading is trained as they are, and what `ask` mounts in modes
`rag` and `hybrid`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from knowstore.experts.expert import Expert, Factors, QueryExperts
from knowstore.experts.hypernetwork import Hypernetwork, HypernetworkConfig, Latent, PassageInput, normal_parameters
from knowstore.experts.llm import FrozenLLM


@dataclass(frozen=True)
class ReaderConfig(HypernetworkConfig):
    """`static_rank` is the rank of the static expert; query experts have `query_rank` neurons from block `query_from`
    up to below the mount layer, and `upper_rank` neurons from above it to the last of `n_blocks` blocks."""

    kind: ClassVar[str] = "reader"
    static_rank: int = 48
    query_from: int = 2
    query_rank: int = 64
    upper_rank: int = 16
    n_blocks: int = 30

    @property
    def query_ranks(self) -> dict[int, int]:
        """The rank of each 0-based block that has a query expert."""
        below = dict.fromkeys(range(min(self.query_from, self.layer), self.layer), self.query_rank)
        return below | dict.fromkeys(range(self.layer + 1, self.n_blocks), self.upper_rank)


class ReaderHypernetwork(Hypernetwork):
    """See the module's docstring."""

    config: ReaderConfig

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.config = config
        D, R = config.width, config.static_rank
        scales = (D**-0.5, R**-0.5, D**-0.5, 0.0)
        self.static_parts = normal_parameters(zip(((D, R), (R, D), (D, R), (R, D)), scales, strict=True))
        ranks = config.query_ranks.values()
        self.query_up = normal_parameters(((D, rank), D**-0.5) for rank in ranks)
        self.query_down = normal_parameters(((rank, D), 0.0) for rank in ranks)

    @property
    def static(self) -> Factors | None:
        return Factors(*self.static_parts)

    @property
    def query(self) -> QueryExperts | None:
        layers = tuple(self.config.query_ranks)
        return QueryExperts(layers, tuple(self.query_up), tuple(self.query_down)) if layers else None

    @torch.no_grad()
    def start_from(self, other: Hypernetwork) -> None:
        """Take over another's static and query experts, as far as they have the same blocks and ranks."""
        if other.static is not None:
            _copy(self.static_parts, (other.static.up1, other.static.up2, other.static.dw1, other.static.dw2))
        if other.query is not None:
            places = {layer: place for place, layer in enumerate(self.config.query_ranks)}
            for layer, up, down in zip(other.query.layers, other.query.up, other.query.down, strict=True):
                if layer in places:
                    _copy([self.query_up[places[layer]], self.query_down[places[layer]]], [up, down])

    def encode(self, llm: FrozenLLM, passages: Sequence[PassageInput]) -> list[Latent]:
        """Nothing of any passage."""
        return [Latent({}, (0,)) for _ in passages]

    def materialise(self, llm: FrozenLLM, latents: Sequence[Latent]) -> list[Expert]:
        """Experts without neurons."""
        width = self.config.width
        return [Expert("neurons", {"up": torch.zeros(width, 0), "down": torch.zeros(0, width)}, (0,)) for _ in latents]


def _copy(parameters: Sequence[nn.Parameter] | nn.ParameterList, tensors: Sequence[torch.Tensor]) -> None:
    for parameter, tensor in zip(parameters, tensors, strict=True):
        if parameter.shape == tensor.shape:
            parameter.copy_(tensor)
