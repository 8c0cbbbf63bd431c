"""Tiny random models of many architectures, and a literal forward pass to compare mounting with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from knowstore.experts import Expert

D, N_LAYERS, N_TOKENS = 32, 3, 64


@pytest.fixture(scope="session", autouse=True)
def torch_is_set_up(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_expert() -> Callable[..., Expert]:
    """A function that makes a random expert of form `neurons`, strong enough to be seen in logits."""

    def make(rank: int = 4, *, seed: int = 0, width: int = D) -> Expert:
        draw = torch.Generator().manual_seed(seed)
        up = torch.randn(width, rank, generator=draw)
        return Expert("neurons", {"up": up, "down": torch.randn(rank, width, generator=draw)}, (rank,))

    return make


@pytest.fixture
def token_ids() -> Tensor:
    """Two sequences of seven tokens, (2, 7)."""
    return torch.randint(3, N_TOKENS, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def build() -> Callable[[str], PreTrainedModel]:
    """A function that gives the tiny random model of an architecture, in float32, frozen."""
    models: dict[str, PreTrainedModel] = {}

    def of(name: str) -> PreTrainedModel:
        if name not in models:
            torch.manual_seed(0)
            models[name] = ARCHITECTURES[name]().eval().requires_grad_(False)
        return models[name]

    return of


def _model(config_class: str, **changes: object) -> PreTrainedModel:
    import transformers

    settings: dict[str, object] = {
        "vocab_size": N_TOKENS,
        "hidden_size": D,
        "intermediate_size": 48,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = getattr(transformers, config_class)(**(settings | changes))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _model("LlamaConfig"),
    "mistral": lambda: _model("MistralConfig", sliding_window=4),
    "qwen2": lambda: _model("Qwen2Config"),
    "qwen3": lambda: _model("Qwen3Config", head_dim=8),
    "gemma2": lambda: _model("Gemma2Config", head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3": lambda: _model("Gemma3TextConfig", head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "gpt2": lambda: _model("GPT2Config", n_embd=D, n_layer=N_LAYERS, n_head=4, n_positions=128, n_inner=48),
    "phi": lambda: _model("PhiConfig"),
    "phi3": lambda: _model("Phi3Config"),
    "opt": lambda: _model("OPTConfig", ffn_dim=48, word_embed_proj_dim=D, init_std=0.2),
    "gpt_neox": lambda: _model("GPTNeoXConfig"),
    "mixtral": lambda: _model("MixtralConfig", num_local_experts=4),
    "qwen2_moe": lambda: _model(
        "Qwen2MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}  # fmt: skip
