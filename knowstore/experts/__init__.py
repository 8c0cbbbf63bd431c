"""Hypernetworks, the experts that they generate, and mounting these on a frozen LLM."""

from knowstore.experts.expert import Expert, Experts, Factors, combine, expert_output
from knowstore.experts.hypernetwork import Hypernetwork, PassageInput, load_hypernetwork
from knowstore.experts.llm import FrozenLLM, load_llm
from knowstore.experts.mount import mount
from knowstore.experts.pooled import PooledConfig, PooledHypernetwork
from knowstore.experts.tokens import TokensConfig, TokensHypernetwork

__all__ = [
    "Expert",
    "Experts",
    "Factors",
    "FrozenLLM",
    "Hypernetwork",
    "PassageInput",
    "PooledConfig",
    "PooledHypernetwork",
    "TokensConfig",
    "TokensHypernetwork",
    "combine",
    "expert_output",
    "load_hypernetwork",
    "load_llm",
    "mount",
]
