"""Models that start in a moment: a random two-block Llama and `pooled` hypernetworks, vectors of hashed words."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from knowstore._loaded import LoadedModels
from knowstore.config import ModelConfig
from knowstore.experts import FrozenLLM, PooledConfig, PooledHypernetwork
from knowstore.experts.hypernetwork import described_hypernetwork
from knowstore.models import DEFAULT
from knowstore.records import Passage
from knowstore.retrieval import load_reranker

WIDTH = 16
FIRST = ModelConfig(device="cpu", dtype="float32")
OTHER = replace(FIRST, hypernetwork="other")
_STOP = "<|im_end|>"


class WordVectors:
    """Stands for a retriever: the normalised sum of a random vector for each word."""

    dim = WIDTH

    def encode_questions(self, questions: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.stack([_vector(question) for question in questions])

    def encode_passages(
        self, passages: Sequence[Passage], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[Any, Any]]:
        return [
            (_vector(f"{one.title} {one.text}"), np.stack([_vector(one.text[start:end]) for start, end in sentences]))
            for one, sentences in zip(passages, spans, strict=True)
        ]


class StandIns(LoadedModels):
    """Models that are made, not read; `hypernetworks` are those that a configuration can name."""

    hypernetworks: dict[str, PooledHypernetwork]

    def with_config(self, config: ModelConfig) -> LoadedModels:
        models = cast(Any, StandIns(config))
        models.llm, models.retriever, models.reranker = self.llm, self.retriever, self.reranker
        models.hypernetworks = self.hypernetworks
        models.hypernetwork = self.hypernetworks[config.hypernetwork]
        models.hypernetwork_config = described_hypernetwork(models.hypernetwork)
        models.has_unit_vectors = True
        names = {"llm": "llm", "retriever": "retriever"}
        names |= {role: role + config.hypernetwork.removeprefix(DEFAULT) for role in ("hypernetwork", "experts")}
        models.fingerprints = {role: hashlib.sha256(name.encode()).hexdigest()[:16] for role, name in names.items()}
        return cast(LoadedModels, models)


def make_models() -> LoadedModels:
    """The same models whenever they are made; nothing is read or written."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = cast(Any, StandIns(FIRST))
    models.llm, models.retriever, models.reranker = _llm(), WordVectors(), load_reranker("late")
    config = PooledConfig(WIDTH, layer=1, trained_steps=1, rank=2, bottleneck=3)
    models.hypernetworks = {one.hypernetwork: PooledHypernetwork(config) for one in (FIRST, OTHER)}
    return cast(LoadedModels, models.with_config(FIRST))


def _llm() -> FrozenLLM:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([_STOP, *letters])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_STOP, pad_token=_STOP)
    return FrozenLLM(model, fast)


def _vector(text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    total = np.full(WIDTH, 1e-3)
    for word in re.findall(r"\w+", text.lower()):
        seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
        total += np.random.default_rng(seed).standard_normal(WIDTH)
    return (total / np.linalg.norm(total)).astype(np.float32)
