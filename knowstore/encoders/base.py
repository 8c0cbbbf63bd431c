"""A published encoder as the base of trained ones: its embeddings are frozen and shared, its layers are trained.

What is trained ships without the embeddings (half of a small encoder's bytes); they are read from the published
encoder's directory, and a digest tells whether they are the right ones.
"""

from __future__ import annotations

import hashlib
import re
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
_LAYER = re.compile(r"\blayer\.(\d+)\.")


@dataclass(frozen=True)
class BaseEncoder:
    """A BERT-like encoder and its fast tokenizer.

    `digest` (16 hex digits) identifies what stays as published: embeddings, vocabulary and the first `n_shared` layers.
    """

    model: nn.Module
    tokenizer: Any
    digest: str
    n_shared: int = 0

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
        """The tensors that training may change: all but the embeddings and the first `n_shared` layers."""
        return {name: t for name, t in self.model.state_dict().items() if not _is_shared(name, self.n_shared)}

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

    def sharing(self, n_shared: int) -> BaseEncoder:
        """The same encoder, of which only the first `n_shared` layers stay as they were published.

        Raises:
            ConfigError: more layers than stay now, some of which are trained; nothing was changed.
        """
        if n_shared > self.n_shared:
            raise ConfigError(
                f"{n_shared} layers cannot stay as published: only the first {self.n_shared} of this encoder are",
                kept="nothing was changed", fix=f"share at most {self.n_shared} layers",
            )  # fmt: skip
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not _is_shared(name, n_shared))
        return BaseEncoder(self.model, self.tokenizer, _digest(self.model, self.tokenizer, n_shared), n_shared)


def load_base(path: Path | str, *, n_shared: int | None = 0) -> BaseEncoder:
    """Load a BERT-like encoder in float32 on the CPU; gradients for its layers, none for its embeddings.

    It has no dropout: drawing it costs a CPU more than the products of a step, and short runs underfit anyway.

    Args:
        n_shared: how many of the first layers stay as published, too; None for half of them.

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
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    n_shared = int(model.config.num_hidden_layers) // 2 if n_shared is None else n_shared
    for name, parameter in model.eval().named_parameters():
        parameter.requires_grad_(not _is_shared(name, n_shared))
    return BaseEncoder(model, tokenizer, _digest(model, tokenizer, n_shared), n_shared)


def _is_shared(name: str, n_shared: int) -> bool:
    layer = _LAYER.search(name)
    return name.startswith(_EMBEDDINGS) or (layer is not None and int(layer[1]) < n_shared)


def _digest(model: Any, tokenizer: Any, n_shared: int) -> str:
    digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point() and _is_shared(name, n_shared):
            digest.update(
                name.removeprefix(_EMBEDDINGS).encode() + tensor.detach().float().contiguous().numpy().tobytes()
            )
    return digest.hexdigest()[:16]
