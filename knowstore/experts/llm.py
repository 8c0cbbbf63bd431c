"""The frozen LLM: loading it, finding its blocks and FFNs, and reading its hidden states.

Any Hugging Face causal LM whose decoder blocks hold an FFN works; nothing here knows an architecture by
name but Baichuan 2, whose published checkpoints come with code of their own. They are Llama with the three
attention projections packed into one matrix and a normalised output head, so they are read as Llama.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from knowstore.errors import ConfigError, MountError

_BAICHUAN_CONFIG = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_FFN_NAMES = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe")

hooks_lock = threading.Lock()  # torch numbers hooks without a lock of its own


class _Reached(Exception):  # noqa: N818 - a way out, no error
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
    def embeddings(self) -> Tensor:
        """The word embeddings, (vocabulary, D)."""
        table: Tensor = self.model.get_input_embeddings().weight
        return table

    @property
    def width(self) -> int:
        """D."""
        return int(self.embeddings.shape[1])

    @property
    def n_layers(self) -> int:
        return len(blocks(self.model))

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the ends of a sequence, and every token that ends a line."""
        ends = self.model.generation_config.eos_token_id if self.model.generation_config is not None else None
        ids = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        marks = ("\n", "\u010a", "<0x0A>")  # as is, in byte-level BPE, and as SentencePiece's byte token
        ids |= {index for token, index in self.tokenizer.get_vocab().items() if any(mark in token for mark in marks)}
        return sorted(ids - {None})

    def prompt_ids(self, text: str, *, is_start: bool = True) -> list[int]:
        """Token ids of a prompt, with what the tokenizer sets before a text when `is_start`.

        Names of control tokens within the text are read as plain text.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=is_start, split_special_tokens=True).input_ids
        ends = self.tokenizer.eos_token_id
        return ids[:-1] if is_start and ids and ids[-1] == ends and len(ids) > 1 else ids

    @property
    def start_ids(self) -> list[int]:
        """Token ids that the tokenizer sets before a text."""
        begun, within = self.prompt_ids("a"), self.prompt_ids("a", is_start=False)
        n_first = len(begun) - len(within)
        return begun[:n_first] if begun[n_first:] == within else []

    def prompt_ids_and_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a piece of text, as `prompt_ids` within a text, and how many characters each has reached."""
        if self.tokenizer.is_fast:
            found = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
            return found.input_ids, [end for _, end in found.offset_mapping]
        ids = self.prompt_ids(text, is_start=False)
        return ids, [min(len(text), len(self.tokenizer.decode(ids[: n + 1]))) for n in range(len(ids))]

    def states(self, ids: Tensor, layer: int) -> Tensor:
        """The input of the FFN of block `layer` for right-padded token ids (B, T): (B, T, D). Blocks above are not
        run; what is mounted below acts. Padding must stand on the right, where no token sees it. Other threads may
        use the model meanwhile.

        Raises:
            MountError: no such block.
        """
        with self.watched(layer, is_end=True) as seen, suppress(_Reached):
            self.model.base_model(input_ids=ids.to(self.device), use_cache=False)
        return seen[0]

    @contextmanager
    def watched(self, layer: int, *, is_end: bool = False) -> Iterator[list[Tensor]]:
        """A list that takes the FFN's input (B, T, D) of block `layer` at each call of the model in this thread;
        with `is_end` the call ends there, by `_Reached`."""
        block, (first, _) = blocks(self.model)[layer], ffn(self.model, layer)
        shapes: list[torch.Size] = []
        seen: list[Tensor] = []
        thread = threading.get_ident()

        def at_block(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if threading.get_ident() == thread:
                shapes.append(first_input(args, kwargs).shape)

        def at_ffn(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if threading.get_ident() == thread:
                seen.append(first_input(args, kwargs).reshape(shapes.pop()))
                if is_end:
                    raise _Reached

        with hooks_lock:
            handles = [
                block.register_forward_pre_hook(at_block, with_kwargs=True),
                first.register_forward_pre_hook(at_ffn, with_kwargs=True),
            ]
        try:
            yield seen
        finally:
            with hooks_lock:
                for handle in handles:
                    handle.remove()


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Tensor:
    """The hidden states that a block or an FFN is called with, by position or by name."""
    states: Tensor = args[0] if args else (kwargs or {})["hidden_states"]
    return states


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


def blocks_owner(model: PreTrainedModel) -> nn.Module:
    """The module that runs the decoder blocks, and is handed the key-value cache by name.

    Raises:
        MountError: as `blocks`.
    """
    layers = blocks(model)
    inside: nn.Module = model.base_model
    return next(module for module in inside.modules() if any(child is layers for child in module.children()))


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
                model = _complete(
                    AutoModelForCausalLM.from_pretrained(
                        path, config=config, dtype=dtype, local_files_only=True, use_safetensors=True,
                        output_loading_info=True,
                    )
                )  # fmt: skip
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
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
    sizes = {name: raw[name] for name in _BAICHUAN_CONFIG if name in raw}
    config = LlamaConfig(**sizes, tie_word_embeddings=False)
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
    return _complete(
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True)
    )


def _complete(loaded: tuple[PreTrainedModel, dict[str, Any]]) -> PreTrainedModel:
    """The model, unless transformers filled tensors that the files lack with random numbers."""
    model, found = loaded
    if found["missing_keys"]:
        raise ValueError(f"no tensors {', '.join(sorted(found['missing_keys'])[:5])}")
    return model


def pad_ids(sequences: Sequence[Sequence[int]], *, value: int = 0) -> Tensor:
    """Token ids side by side, (B, T), padded on the right with `value`."""
    out = torch.full((len(sequences), max((len(s) for s in sequences), default=0)), value)
    for row, sequence in enumerate(sequences):
        out[row, : len(sequence)] = torch.as_tensor(sequence)
    return out
