"""Hypernetworks, the experts that they generate, and mounting these on a frozen LLM."""

from knowstore.experts.expert import (
    Amplitude,
    Expert,
    Experts,
    Factors,
    Mountable,
    QueryExperts,
    Turns,
    combine,
    expert_output,
    heaviest,
    on_where,
    segment_weights,
    word_weights,
)
from knowstore.experts.forcing import forced_nats, forced_scores
from knowstore.experts.generation import Generated, Prompt, generate
from knowstore.experts.hypernetwork import Hypernetwork, Latent, PassageInput, load_hypernetwork
from knowstore.experts.llm import FrozenLLM, load_llm
from knowstore.experts.making import new_hypernetwork
from knowstore.experts.mount import beside, mount
from knowstore.experts.pooled import PooledConfig, PooledHypernetwork
from knowstore.experts.reader import ReaderConfig, ReaderHypernetwork
from knowstore.experts.tokens import TokensConfig, TokensHypernetwork

__all__ = [
    "Amplitude",
    "Expert",
    "Experts",
    "Factors",
    "FrozenLLM",
    "Generated",
    "Hypernetwork",
    "Latent",
    "Mountable",
    "PassageInput",
    "PooledConfig",
    "PooledHypernetwork",
    "Prompt",
    "QueryExperts",
    "ReaderConfig",
    "ReaderHypernetwork",
    "TokensConfig",
    "TokensHypernetwork",
    "Turns",
    "beside",
    "combine",
    "expert_output",
    "forced_nats",
    "forced_scores",
    "generate",
    "heaviest",
    "load_hypernetwork",
    "load_llm",
    "mount",
    "new_hypernetwork",
    "on_where",
    "segment_weights",
    "word_weights",
]
