"""The interface of hypernetworks: a passage goes in, its expert comes out; saved without pickle."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from knowstore.encoders import load_base, read_description, read_tensors
from knowstore.errors import ConfigError, HypernetworkError
from knowstore.experts.expert import Expert, Experts, Factors, QueryExperts
from knowstore.experts.llm import FrozenLLM

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_MAX_SIZE = 1 << 24
_RANGES = {"layer": (0, 4095), "trained_steps": (0, 1 << 40), "query_from": (0, 4095), "n_blocks": (1, 4096)}


@dataclass(frozen=True)
class PassageInput:
    """A passage as hypernetworks take it: `spans` are the character spans of its sentences in `text`."""

    title: str
    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Latent:
    """What the last linear map of a hypernetwork needs to make an expert of: named arrays on the CPU."""

    tensors: dict[str, Tensor]
    segment_ranks: tuple[int, ...]


@dataclass(frozen=True)
class HypernetworkConfig:
    """What every kind has: `width` is the LLM's D, `layer` the 0-based block that its experts are for,
    `trained_steps` 0 for a hypernetwork that nobody trained, `max_norm` the bound on what its experts
    add at a position (None: no bound), `notes` how it was made, for `knowstore models list`."""

    kind: ClassVar[str]
    width: int
    layer: int = 12
    trained_steps: int = 0
    max_norm: float | None = None
    notes: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = _RANGES.get(field.name, (1, _MAX_SIZE))
            if field.type == "int" and (type(value) is not int or not low <= value <= high):
                raise _config_error(f"{field.name} is {value!r}", f"use a whole number from {low} to {high}")
        bound = self.max_norm
        if bound is not None and not (isinstance(bound, int | float) and 0 < bound < math.inf):
            raise _config_error(f"max_norm is {bound!r}", "use a number above 0, or none")


def _config_error(what: str, fix: str) -> HypernetworkError:
    return HypernetworkError(f"a hypernetwork's {what}", kept="no hypernetwork was made", fix=fix)


class Hypernetwork(nn.Module, ABC):
    """Generates experts; `encode` then `materialise`, so that a bank may keep what stands between them."""

    config: HypernetworkConfig

    @property
    def query(self) -> QueryExperts | None:
        """Experts below the mount layer that every question gets: what makes its state a better query."""
        return None

    @property
    @abstractmethod
    def static(self) -> Factors | None:
        """The expert that every question gets and no passage owns: how to answer, and no knowledge."""

    @abstractmethod
    def encode(self, llm: FrozenLLM, passages: Sequence[PassageInput]) -> list[Latent]:
        """Run everything but the last linear map, without gradients; one latent for each passage."""

    @abstractmethod
    def materialise(self, llm: FrozenLLM, latents: Sequence[Latent]) -> list[Expert]:
        """The last map: the expert is a linear function of the latent; float32 on the CPU."""

    def part(self, latent: Latent, neurons: Sequence[int]) -> Latent:
        """The latent of some of an expert's neurons, in that order, as one segment, for a kind whose neurons can be
        made alone (those that have `neuron_spans`)."""
        raise NotImplementedError

    def set_trainable(self) -> None:
        """Gradients for everything that training may change."""
        self.requires_grad_(True)

    def static_experts(self, llm: FrozenLLM) -> Experts:
        """What every question gets and no passage owns, ready to be mounted alone."""
        static, query = self.static, self.query
        return Experts(
            static=None if static is None else static.to(llm.device, llm.dtype),
            query=None if query is None else query.to(llm.device, llm.dtype),
        )

    def neuron_spans(self, llm: FrozenLLM, passage: PassageInput) -> list[tuple[int, int]] | None:
        """The characters of the passage's text that each neuron of its expert stands for; None for a kind whose
        neurons stand for the passage as a whole."""
        return None

    def generate(self, llm: FrozenLLM, passages: Sequence[PassageInput]) -> list[Expert]:
        """The experts of a batch of passages, in order."""
        return self.materialise(llm, self.encode(llm, passages))

    def own_tensors(self) -> dict[str, Tensor]:
        """The tensors that make it what it is, by name; not those of a published model that it builds on."""
        return self.state_dict()

    def fingerprint(self) -> str:
        """Digest of kind, config without its notes, and weights, 16 hex digits: experts of another one never mix with
        its."""
        described = described_hypernetwork(self) | {"notes": ""}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for name, tensor in sorted(self.own_tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write `model.safetensors` and `config.json`; floating weights are stored in `dtype`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
            for name, tensor in self.own_tensors().items()
        }
        (folder / _WEIGHTS).write_bytes(save(tensors))
        (folder / _CONFIG).write_text(json.dumps(described_hypernetwork(self), indent=2) + "\n", "utf-8")


def normal_parameters(shapes: Iterable[tuple[tuple[int, int], float]]) -> nn.ParameterList:
    """Matrices of normal numbers, given as (shape, standard deviation)."""
    return nn.ParameterList(nn.Parameter(torch.randn(shape) * scale) for shape, scale in shapes)


def described_hypernetwork(hypernetwork: Hypernetwork) -> dict[str, Any]:
    """What its config.json says."""
    return {"kind": hypernetwork.config.kind, **asdict(hypernetwork.config)}


def load_hypernetwork(folder: Path, *, device: str = "cpu", base: Callable[[str], Path] = Path) -> Hypernetwork:
    """Read a hypernetwork that `save` wrote; its weights are float32 whatever they were stored in.

    Args:
        base: gives the directory of the published encoder that a `tokens` hypernetwork was trained from, by its
            reference; references are directories when not given.

    Raises:
        HypernetworkError: files missing or damaged, an unknown kind, or weights that do not fit the config.
    """
    from knowstore.experts.pooled import PooledConfig, PooledHypernetwork
    from knowstore.experts.reader import ReaderConfig, ReaderHypernetwork
    from knowstore.experts.tokens import TokensConfig, TokensHypernetwork

    try:
        described = read_description(folder / _CONFIG)
        kind = described.pop("kind")
        encoder = load_base(base(str(described.get("base")))) if kind == "tokens" else None
        with torch.device("meta"):  # no memory is taken on the word of the config alone
            if kind == "pooled":
                hypernetwork: Hypernetwork = PooledHypernetwork(PooledConfig(**described))
            elif kind == "reader":
                hypernetwork = ReaderHypernetwork(ReaderConfig(**described))
            elif encoder is not None:
                config = TokensConfig(**described)
                if (config.base_digest, config.encoder_width) != (encoder.digest, encoder.width):
                    raise ValueError(
                        f"it was trained from the encoder {config.base_digest} of width {config.encoder_width}, "
                        f"here is {encoder.digest} of width {encoder.width}"
                    )
                hypernetwork = TokensHypernetwork(config, encoder)
            else:
                raise ValueError(f"its kind is {kind!r}, known are 'pooled', 'reader' and 'tokens'")
        shapes = {name: tuple(tensor.shape) for name, tensor in hypernetwork.own_tensors().items()}
        weights = read_tensors(folder / _WEIGHTS, shapes)
        floats = {name: t.float() if t.is_floating_point() else t for name, t in weights.items()}
        hypernetwork.load_state_dict(floats, strict=False, assign=True)
    except (
        HypernetworkError,
        ConfigError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        why = error.what if isinstance(error, HypernetworkError | ConfigError) else error
        raise HypernetworkError(
            f"{folder} holds no hypernetwork that can be read: {why}",
            kept="nothing was loaded",
            fix="give a folder that `knowstore train hypernetwork` wrote",
        ) from error
    return hypernetwork.eval().requires_grad_(False).to(torch.device(device))
