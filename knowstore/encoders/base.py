"""A published encoder as the base of trained ones: its embeddings are frozen and shared, its layers are trained.

What is trained ships without the embeddings (half of a small encoder's bytes); they are read from the published
encoder's directory, and a digest tells whether they are the right ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from knowstore.errors import ConfigError

_EMBEDDINGS = "embeddings."


@dataclass(frozen=True)
class BaseEncoder:
    """A BERT-like encoder and its fast tokenizer; `digest` (16 hex digits) identifies its embeddings and vocabulary."""

    model: nn.Module
    tokenizer: Any
    digest: str

    @property
    def width(self) -> int:
        """E, the width of its states."""
        config: Any = self.model.config
        return int(config.hidden_size)

    @property
    def max_tokens(self) -> int:
        """The longest input, special tokens included."""
        config: Any = self.model.config
        return int(config.max_position_embeddings)

    def states(self, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> Tensor:
        """States (B, T, E) of token ids (B, T); `mask` is 0 at padding, `types` is 1 in the second text of a pair."""
        out: Tensor = self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        return out

    def layers(self) -> dict[str, Tensor]:
        """The tensors that training may change: all but the embeddings."""
        return {name: t for name, t in self.model.state_dict().items() if not name.startswith(_EMBEDDINGS)}

    def set_layers(self, tensors: Mapping[str, Tensor]) -> None:
        """Put trained layers in the place of the published ones.

        Raises:
            ConfigError: tensors of another encoder; nothing was changed.
        """
        own = self.layers()
        if set(own) != set(tensors) or any(own[name].shape != t.shape for name, t in tensors.items()):
            raise ConfigError(
                f"{len(tensors)} trained tensors do not fit the {len(own)} of this encoder",
                kept="nothing was loaded", fix="use the encoder that they were trained on",
            )  # fmt: skip
        self.model.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)


def load_base(path: Path | str) -> BaseEncoder:
    """Load a BERT-like encoder in float32 on the CPU; gradients for its layers, none for its embeddings.

    Raises:
        ConfigError: the directory holds no such encoder, or its tokenizer gives no character offsets.
    """
    fix = "give the directory of a BERT-like encoder with a fast tokenizer, such as all-MiniLM-L6-v2"
    logging: Any = transformers.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        model = AutoModel.from_pretrained(str(path), dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"{path} cannot be read as an encoder: {error}", kept="nothing was loaded", fix=fix
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
    if not tokenizer.is_fast or not hasattr(model, "embeddings"):
        raise ConfigError(
            f"the {type(model).__name__} in {path} has no embeddings or no fast tokenizer",
            kept="nothing was loaded", fix=fix,
        )  # fmt: skip
    if hasattr(model, "pooler"):
        model.pooler = None
    model.eval().embeddings.requires_grad_(False)
    return BaseEncoder(model, tokenizer, _digest(model, tokenizer))


def _digest(model: Any, tokenizer: Any) -> str:
    digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
    for name, tensor in sorted(model.embeddings.state_dict().items()):
        if tensor.is_floating_point():
            digest.update(name.encode() + tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
