"""The frozen LLM: loading it, finding its blocks and FFNs, and reading its hidden states.

Any Hugging Face causal LM whose decoder blocks hold an FFN works; nothing here knows an architecture by
name but Baichuan 2, whose published checkpoints come with code of their own. They are Llama with the three
attention projections packed into one matrix and a normalised output head, so they are read as Llama.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from knowstore.errors import ConfigError, MountError

_FFN_NAMES = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe")


class _Reached(Exception):
    """Leaves a forward pass at the FFN of interest; blocks above it are not run."""


@dataclass(frozen=True)
class FrozenLLM:
    """A causal LM whose parameters are never changed, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def n_layers(self) -> int:
        return len(blocks(self.model))

    @torch.no_grad()
    def states(self, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Hidden states of right-padded token ids (B, T): the input of block `layer` and that of its FFN,
        both (B, T, D). Blocks above are not run. Padding must stand on the right, where no token sees it.

        Raises:
            MountError: no such block.
        """
        block, (first, _) = blocks(self.model), ffn(self.model, layer)
        seen: dict[str, Tensor] = {}

        def at_block(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["block"] = args[0] if args else kwargs["hidden_states"]

        def at_ffn(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["ffn"] = args[0] if args else kwargs["hidden_states"]
            raise _Reached

        handles = [
            block[layer].register_forward_pre_hook(at_block, with_kwargs=True),
            first.register_forward_pre_hook(at_ffn, with_kwargs=True),
        ]
        try:
            self.model.base_model(input_ids=ids.to(self.device), use_cache=False)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen["block"], seen["ffn"].reshape(seen["block"].shape)

    @contextmanager
    def upper(self, layer: int) -> Iterator[_Upper]:
        """Blocks `layer` and above as a callable from their cached input (B, T, D) to the final states
        (B, T, D), for training; the model is whole again afterwards."""
        layers = blocks(self.model)
        inject = _Upper(self.model)
        kept = list(layers)
        for index in range(layer):
            layers[index] = _Skip(kept[index], inject if index == layer - 1 else None)
        try:
            yield inject
        finally:
            for index in range(layer):
                layers[index] = kept[index]


class _Upper:
    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.states: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        self.states = states
        out: Tensor = self._model.base_model(inputs_embeds=states, use_cache=False).last_hidden_state
        return out


class _Skip(nn.Module):
    """Stands where a block stood, and hands on what it is given or what was cached."""

    def __init__(self, block: nn.Module, source: _Upper | None) -> None:
        super().__init__()
        self.source = source
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states if self.source is None or self.source.states is None else self.source.states


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of a causal LM, lowest first.

    Raises:
        MountError: no list of as many blocks as the config has layers.
    """
    text = model.config.get_text_config()
    n_layers = getattr(text, "num_hidden_layers", None) or getattr(text, "n_layer", None)
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise MountError(
        f"{type(model).__name__} has no list of {n_layers} decoder blocks",
        kept="the model is as it was",
        fix="use a Hugging Face causal LM with an FFN in each decoder block",
    )


def ffn(model: PreTrainedModel, layer: int) -> tuple[nn.Module, nn.Module]:
    """The FFN of the 0-based block `layer`: the module that takes its input x_t and the one that gives its
    output (the same one, but for blocks that hold their two linear maps directly).

    Raises:
        MountError: no such block, or none of its parts is an FFN.
    """
    layers = blocks(model)
    if not 0 <= layer < len(layers):
        raise MountError(
            f"layer {layer} of a model with {len(layers)} blocks",
            kept="the model is as it was",
            fix=f"use a layer from 0 to {len(layers) - 1}",
        )
    parts = dict(layers[layer].named_children())
    for name in _FFN_NAMES:
        if name in parts:
            return parts[name], parts[name]
    if "fc1" in parts and "fc2" in parts:
        return parts["fc1"], parts["fc2"]
    raise MountError(
        f"block {layer} of {type(model).__name__} has parts {', '.join(parts)}, and none is an FFN",
        kept="the model is as it was",
        fix="use a Hugging Face causal LM with an FFN in each decoder block",
    )


def load_llm(path: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> FrozenLLM:
    """Load a causal LM and its tokenizer from a directory, frozen; safetensors only, no code from the directory.

    Raises:
        ConfigError: the directory holds no causal LM that transformers can read.
    """
    try:
        kind = json.loads((path / "config.json").read_text("utf-8")).get("model_type")
        with _quiet():
            if kind == "baichuan":
                model = _load_baichuan(path, dtype)
            else:
                config = AutoConfig.from_pretrained(path, local_files_only=True)
                model = AutoModelForCausalLM.from_pretrained(
                    path, config=config, dtype=dtype, local_files_only=True, use_safetensors=True
                )
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"{path} holds no causal language model that can be read: {error}",
            kept="nothing was loaded",
            fix="give a directory with config.json, safetensors weights and a tokenizer",
        ) from error
    model.eval().requires_grad_(False)
    return FrozenLLM(model.to(torch.device(device)), tokenizer)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's own bars and notes off the terminal while loading."""
    level, had_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bar:
            transformers_logging.enable_progress_bar()


def _load_baichuan(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    raw = json.loads((path / "config.json").read_text("utf-8"))
    if raw.get("position_embedding", "").upper() == "ALIBI" or raw.get("hidden_size") == 5120:
        raise ValueError("Baichuan 2 with ALiBi positions (13B) is not Llama; the 7B models are")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "hidden_act", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    config = LlamaConfig(**{name: raw[name] for name in names if name in raw}, tie_word_embeddings=False)
    weights: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a file handle, not a dict
                weights[name] = tensors.get_tensor(name)
    for name in [name for name in weights if ".W_pack." in name]:
        for part, matrix in zip("qkv", weights.pop(name).chunk(3), strict=True):
            weights[name.replace("W_pack", f"{part}_proj")] = matrix.contiguous()
    head = weights["lm_head.weight"].float()
    weights["lm_head.weight"] = nn.functional.normalize(head)  # what Baichuan 2's NormHead computes at inference
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    return model


def pad_ids(sequences: Sequence[Sequence[int]], *, value: int = 0) -> Tensor:
    """Token ids side by side, (B, T), padded on the right with `value`."""
    out = torch.full((len(sequences), max((len(s) for s in sequences), default=0)), value)
    for row, sequence in enumerate(sequences):
        out[row, : len(sequence)] = torch.as_tensor(sequence)
    return out
