"""The `pooled` hypernetwork: the paper's Eq. 4 as it stands, the baseline of every other design."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from knowstore.experts.expert import Expert, Factors
from knowstore.experts.hypernetwork import Hypernetwork, HypernetworkConfig, Latent, PassageInput
from knowstore.experts.llm import FrozenLLM


@dataclass(frozen=True)
class PooledConfig(HypernetworkConfig):
    """`rank` is the paper's k, `bottleneck` the width between its two linear layers."""

    kind: ClassVar[str] = "pooled"
    rank: int = 32
    bottleneck: int = 64


class PooledHypernetwork(Hypernetwork):
    """Eq. 4: theta = Linear(ReLU(Linear(mean of the passage's word embeddings))), reshaped to Eq. 2's matrices."""

    config: PooledConfig

    def __init__(self, config: PooledConfig) -> None:
        super().__init__()
        self.config = config
        self.inner = nn.Linear(config.width, config.bottleneck)
        self.outer = nn.Linear(config.bottleneck, 4 * config.width * config.rank)

    @property
    def static(self) -> Factors | None:
        return None

    def latents(self, mean_embedding: Tensor) -> Tensor:
        """The bottleneck (B, bottleneck) of the mean word embedding (B, D)."""
        return self.inner(mean_embedding).relu()  # type: ignore[no-any-return]

    def factors(self, latents: Tensor) -> Factors:
        """Eq. 2's matrices for B passages: `up1` (B, D, R), `up2` (B, R, D), `dw1` (B, D, R), `dw2` (B, R, D)."""
        width, rank = self.config.width, self.config.rank
        parts = self.outer(latents).chunk(4, dim=-1)
        shapes = ((width, rank), (rank, width), (width, rank), (rank, width))
        return Factors(*(part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)))

    def mean_embeddings(self, llm: FrozenLLM, passages: Sequence[PassageInput]) -> Tensor:
        """Emd(psg) of Eq. 4: the mean of the LLM's word embeddings of title and text, (B, D) in float32."""
        table = llm.embeddings
        device = self.inner.weight.device
        means = []
        for passage in passages:
            text = f"{passage.title}. {passage.text}" if passage.title else passage.text
            ids = torch.tensor(llm.prompt_ids(text, is_start=False), device=table.device)
            means.append(table[ids].float().mean(0))
        return torch.stack(means).to(device)

    @torch.no_grad()
    def encode(self, llm: FrozenLLM, passages: Sequence[PassageInput]) -> list[Latent]:
        latents = self.latents(self.mean_embeddings(llm, passages)).cpu()
        return [Latent({"latent": row}, (self.config.rank,)) for row in latents]

    @torch.no_grad()
    def materialise(self, llm: FrozenLLM, latents: Sequence[Latent]) -> list[Expert]:
        stacked = torch.stack([latent.tensors["latent"].float() for latent in latents])
        four = self.factors(stacked.to(self.inner.weight.device))
        parts = {"up1": four.up1, "up2": four.up2, "dw1": four.dw1, "dw2": four.dw2}
        return [
            Expert("factors", {name: part[row].cpu() for name, part in parts.items()}, (self.config.rank,))
            for row in range(len(latents))
        ]
