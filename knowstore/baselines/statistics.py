"""Second moments of FFN keys, C = E[k k^T], estimated from a corpus sample and kept in a cache file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from knowstore._loaded import OnProgress
from knowstore.baselines.cache import TensorCache
from knowstore.baselines.weights import down_projection, inputs_of, run_through
from knowstore.experts import FrozenLLM

_MAX_TOKENS = 256  # of a text


@dataclass(frozen=True)
class CorpusSample:
    """Texts that say what keys are usual, how many of their tokens are read, and where the statistics are kept.

    Args:
        texts: passages that hold no evaluation data.
        n_tokens: reading ends once as many tokens were read.
        cache_dir: None keeps nothing.
        fingerprint: of the LLM, which the statistics belong to.
    """

    texts: Sequence[str]
    n_tokens: int = 20_000
    cache_dir: Path | None = None
    fingerprint: str = ""


def key_moments(
    llm: FrozenLLM, layers: Sequence[int], sample: CorpusSample, on_progress: OnProgress | None = None
) -> dict[int, Tensor]:
    """C (d, d) in float32 of the inputs k (d,) of the last linear map of the FFNs of some 0-based blocks."""
    cache = TensorCache.of(
        sample.cache_dir,
        "statistics",
        [sample.fingerprint, sorted(layers), sample.n_tokens, _MAX_TOKENS, *sample.texts],
    )
    kept = cache.read()
    if kept is not None:
        return {layer: kept[str(layer)].to(llm.device) for layer in layers}
    found = _measure(llm, layers, sample, on_progress)
    cache.keep({str(layer): moment for layer, moment in found.items()})
    return found


def _measure(
    llm: FrozenLLM, layers: Sequence[int], sample: CorpusSample, on_progress: OnProgress | None
) -> dict[int, Tensor]:
    projections = [down_projection(llm.model, layer) for layer in layers]
    sums = [torch.zeros(one.in_features, one.in_features, device=llm.device) for one in projections]
    n_seen = 0
    for text in sample.texts:
        ids = torch.tensor([llm.prompt_ids(text)[:_MAX_TOKENS]], device=llm.device)
        with inputs_of(projections) as seen:
            run_through(llm, ids, max(layers))
        for total, [keys] in zip(sums, seen, strict=True):
            flat = keys.reshape(-1, keys.shape[-1]).float()  # (T, d)
            total += flat.T @ flat
        n_seen += ids.shape[1]
        if on_progress is not None:
            on_progress("statistics of keys, tokens", min(n_seen, sample.n_tokens), sample.n_tokens)
        if n_seen >= sample.n_tokens:
            break
    return {layer: total / max(1, n_seen) for layer, total in zip(layers, sums, strict=True)}
