"""New hypernetworks for an LLM, before anything of them is trained."""

from __future__ import annotations

from pathlib import Path

from knowstore.encoders import load_base
from knowstore.errors import HypernetworkError
from knowstore.experts.hypernetwork import Hypernetwork
from knowstore.experts.llm import FrozenLLM
from knowstore.experts.pooled import PooledConfig, PooledHypernetwork
from knowstore.experts.tokens import TokensConfig, TokensHypernetwork


def new_hypernetwork(
    kind: str,
    llm: FrozenLLM,
    *,
    encoder: Path,
    reference: str = "default",
    layer: int = 12,
    max_norm: float | None = 250.0,
) -> Hypernetwork:
    """A new hypernetwork with random weights, which take torch's seed.

    Args:
        kind: `tokens` or `pooled`.
        llm: what its experts are for; it gives width and device.
        encoder: directory of the published encoder that `tokens` starts from.
        reference: what that directory was resolved from, for the config.
        layer: 0-based decoder block of its experts.
        max_norm: bound on what experts add at a position, or None.

    Raises:
        HypernetworkError: no such kind, or no such block.
    """
    if kind not in ("tokens", "pooled") or not 0 <= layer < llm.n_layers:
        raise HypernetworkError(
            f"a hypernetwork of kind {kind!r} for layer {layer} of a model of {llm.n_layers} layers",
            kept="nothing was trained", fix=f"use `tokens` or `pooled`, and a layer from 0 to {llm.n_layers - 1}",
        )  # fmt: skip
    if kind == "pooled":
        return PooledHypernetwork(PooledConfig(llm.width, layer=layer, max_norm=max_norm)).to(llm.device)
    base = load_base(encoder)
    sizes = TokensConfig(
        width=llm.width,
        layer=layer,
        encoder_width=base.width,
        base=reference,
        base_digest=base.digest,
        max_norm=max_norm,
    )
    return TokensHypernetwork(sizes, base).to(llm.device)
