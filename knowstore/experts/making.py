"""New hypernetworks for an LLM, before anything of them is trained."""

from __future__ import annotations

from dataclasses import replace
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
    encoder_from: Hypernetwork | None = None,
) -> Hypernetwork:
    """A new hypernetwork with random weights, which take torch's seed.

    Args:
        kind: `tokens` or `pooled`.
        llm: what its experts are for; it gives width and device.
        encoder: directory of the published encoder that `tokens` starts from.
        reference: what that directory was resolved from, for the config.
        layer: 0-based decoder block of its experts.
        max_norm: bound on what experts add at a position, or None.
        encoder_from: a `tokens` hypernetwork, for any layer of any LLM, that reads passages as the new one is to read
            them from the start: its encoder and the codes that it gives are copied.

    Raises:
        HypernetworkError: no such kind, no such block, or an `encoder_from` that is not of this kind and encoder.
    """
    if kind not in ("tokens", "pooled") or not 0 <= layer < llm.n_layers:
        raise HypernetworkError(
            f"a hypernetwork of kind {kind!r} for layer {layer} of a model of {llm.n_layers} layers",
            kept="nothing was trained", fix=f"use `tokens` or `pooled`, and a layer from 0 to {llm.n_layers - 1}",
        )  # fmt: skip
    if encoder_from is not None and (kind != "tokens" or not isinstance(encoder_from, TokensHypernetwork)):
        raise HypernetworkError(
            f"a {kind} hypernetwork cannot read passages with the encoder of a {encoder_from.config.kind} one",
            kept="nothing was trained", fix="take over the encoder of one of kind `tokens`, for a new one of that kind",
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
    if encoder_from is None:
        return TokensHypernetwork(sizes, base).to(llm.device)
    if encoder_from.config.base_digest != base.digest:
        raise HypernetworkError(
            f"the encoder that is to be taken over was trained from {encoder_from.config.base_digest}, "
            f"{reference} is {base.digest}",
            kept="nothing was trained", fix="name the retriever that it was trained from with `--retriever`",
        )  # fmt: skip
    new = TokensHypernetwork(replace(sizes, code_width=encoder_from.config.code_width), base)
    new.encoder.load_state_dict(encoder_from.encoder.state_dict())
    new.code.load_state_dict(encoder_from.code.state_dict())
    return new.to(llm.device)
