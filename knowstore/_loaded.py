"""The models of an open store, resolved at once and loaded when they are first needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowstore.bank import ExpertShape, StoredExpert
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError, HypernetworkError, KnowledgeStoreError
from knowstore.models import (
    DEFAULT,
    NO_READER,
    ROLES,
    choose_device,
    choose_dtype,
    directory_fingerprint,
    lasting_reference,
    locate,
    resolve,
)

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from knowstore.experts import (
        Expert,
        Experts,
        FrozenLLM,
        Hypernetwork,
        PassageInput,
        QueryExperts,
        ReaderHypernetwork,
    )
    from knowstore.retrieval import Reranker, Retriever

OnProgress = Callable[[str, int, int | None], None]


@dataclass
class LoadedModels:
    """Models by role, each loaded on first use; fingerprints are known without loading anything."""

    config: ModelConfig
    allow_untrained: bool = False
    on_progress: OnProgress | None = None
    cache_dir: Path | None = None
    _paths: dict[str, Path] = field(default_factory=dict)

    def with_config(self, config: ModelConfig) -> LoadedModels:
        """Other models with the same settings, nothing of them loaded yet."""
        return LoadedModels(config, self.allow_untrained, self.on_progress, self.cache_dir)

    def path(self, role: str) -> Path:
        """The directory of a model, converted or fetched when it must be."""
        if role not in self._paths:
            resolved = resolve(getattr(self.config, role), role, cache_dir=self.cache_dir, progress=self.on_progress)  # type: ignore[arg-type]
            self._paths[role] = resolved.path
        return self._paths[role]

    def kept_config(self) -> ModelConfig:
        """The configuration as a store records it: with references that stand for the same models in any folder."""
        kept = {role: lasting_reference(getattr(self.config, role), role, cache_dir=self.cache_dir) for role in ROLES}
        return replace(self.config, **kept)  # type: ignore[arg-type]

    @cached_property
    def device(self) -> str:
        return choose_device(self.config.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        return choose_dtype(self.config.dtype, self.device)

    @cached_property
    def llm(self) -> FrozenLLM:
        from knowstore.experts import load_llm

        return load_llm(self.path("llm"), device=self.device, dtype=self.dtype)

    @cached_property
    def hypernetwork(self) -> Hypernetwork:
        """The hypernetwork, for this LLM.

        Raises:
            HypernetworkError: it was made for an LLM of another width, or nobody trained it.
        """
        from knowstore.experts import load_hypernetwork

        hypernetwork = load_hypernetwork(self.path("hypernetwork"), device=self.device, base=self._encoder)
        config = hypernetwork.config
        if config.width != self.llm.width or config.layer >= self.llm.n_layers:
            raise HypernetworkError(
                f"the hypernetwork makes experts of width {config.width} for layer {config.layer}, "
                f"the LLM has width {self.llm.width} and {self.llm.n_layers} layers",
                kept="the store is as it was",
                fix="train one for this LLM with `knowstore train hypernetwork`",
            )
        return hypernetwork

    @cached_property
    def reader(self) -> ReaderHypernetwork | None:
        """What is mounted where passages are read in the prompt; None for `none`, and where the default one was made
        for another LLM or for another layer than the hypernetwork's.

        Raises:
            HypernetworkError: one that was named is no reader, or was made for another LLM or layer.
        """
        from knowstore.experts import ReaderHypernetwork, load_hypernetwork

        if self.config.reader == NO_READER:
            return None
        reader = load_hypernetwork(self.path("reader"), device=self.device)
        layer = self.hypernetwork_config["layer"]
        if isinstance(reader, ReaderHypernetwork) and (
            reader.config.width, reader.config.n_blocks, reader.config.layer,
        ) == (self.llm.width, self.llm.n_layers, layer):  # fmt: skip
            return reader
        if self.config.reader == DEFAULT:
            return None
        raise HypernetworkError(
            f"{self.config.reader!r} is no reader for a model of width {self.llm.width} with {self.llm.n_layers} "
            f"blocks and experts at layer {layer}",
            kept="the store is as it was",
            fix="train one with `knowstore train reader`, or use `none`",
        )

    @cached_property
    def query(self) -> QueryExperts | None:
        """The hypernetwork's query experts, as they are mounted to answer."""
        found = self.hypernetwork.query
        return None if found is None else found.with_rounded()

    @cached_property
    def reader_experts(self) -> Experts | None:
        """The reader's static and query experts, as they are mounted to answer; None without a reader."""
        if self.reader is None:
            return None
        found = self.reader.static_experts(self.llm)
        return found if found.query is None else replace(found, query=found.query.with_rounded())

    @cached_property
    def retriever(self) -> Retriever:
        from knowstore.retrieval import Retriever

        path, fingerprint = self.path("retriever"), self.digest("retriever")
        return Retriever.load(path, self.device, self.dtype, weights_fingerprint=fingerprint)

    @cached_property
    def reranker(self) -> Reranker:
        from knowstore.retrieval import load_reranker

        return load_reranker(
            self.config.reranker, self.path("reranker"), self.device, self.dtype, base=self._encoder,
            weights_fingerprint=self.digest("reranker"),
        )  # fmt: skip

    def _encoder(self, reference: str) -> Path:
        """The directory of the published encoder that a reference of the role retriever stands for."""
        return resolve(reference, "retriever", cache_dir=self.cache_dir, progress=self.on_progress).path

    @cached_property
    def hypernetwork_config(self) -> dict[str, Any]:
        """The hypernetwork's own description, read without its weights."""
        path = self.path("hypernetwork") / "config.json"
        try:
            described = json.loads(path.read_text("utf-8"))
            return {"layer": int(described["layer"]), **described}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise HypernetworkError(
                f"{path} is not the description of a hypernetwork: {error}",
                kept="the store is as it was",
                fix="give a folder that `knowstore train hypernetwork` wrote",
            ) from error

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Digests of LLM, retriever and hypernetwork, and `experts`: what an expert was made for and by."""
        found = {role: self.digest(role)[:16] for role in ("llm", "retriever", "hypernetwork")}
        layer = self.hypernetwork_config["layer"]
        joined = f"{found['llm']}/{layer}/{found['hypernetwork']}"
        return found | {"experts": hashlib.sha256(joined.encode()).hexdigest()[:16]}

    @cached_property
    def expert_shape(self) -> ExpertShape | None:
        """What experts look like that the hypernetwork makes, told without its weights or the LLM's; None for a kind
        that makes none."""
        described = self.hypernetwork_config
        kind = described.get("kind")
        try:
            if kind == "pooled":
                width, rank, bottleneck = (int(described[name]) for name in ("width", "rank", "bottleneck"))
                return ExpertShape("factors", width, range(rank, rank + 1), {"latent": (bottleneck,)}, {}, None)
            if kind == "tokens":
                width, code, most = (int(described[name]) for name in ("width", "code_width", "max_tokens"))
                latent = {"code": (None, code), "ids": (None,), "before": (1,)}
                words = {"ids": 0, "before": -1}
                return ExpertShape("neurons", width, range(1, most + 1), latent, words, _n_words(self.path("llm")))
        except (KeyError, TypeError, ValueError):
            pass  # loading the hypernetwork says what is wrong with its description
        return None

    @cached_property
    def has_unit_vectors(self) -> bool:
        """Whether the retriever's vectors have length 1, told without its weights."""
        from knowstore.retrieval import gives_unit_vectors

        return gives_unit_vectors(self.path("retriever"))

    def shape_of(self, fingerprint: str | None) -> ExpertShape | None:
        """What experts of a fingerprint look like; None where they are not those of these models, or these are not on
        this machine: nothing is fetched or converted for it."""
        try:
            for role in ("llm", "retriever", "hypernetwork"):
                if locate(getattr(self.config, role), role, cache_dir=self.cache_dir).needs_conversion:
                    return None
            return self.expert_shape if self.fingerprints["experts"] == fingerprint else None
        except (KnowledgeStoreError, OSError):
            return None

    def digest(self, role: str) -> str:
        """What identifies the files of a model, as 64 hex digits; empty where a reranker or reader has none."""
        path = self.path(role)
        has_files = role not in ("reranker", "reader") or (path / "config.json").is_file()
        return directory_fingerprint(path, cache_dir=self.cache_dir) if has_files else ""

    def check_trained(self) -> None:
        """Refuse a hypernetwork that nobody trained, unless the store was opened to allow it."""
        if not self.allow_untrained and not self.hypernetwork_config.get("trained_steps"):
            raise HypernetworkError(
                f"the hypernetwork in {self.path('hypernetwork')} was never trained: its experts carry nothing",
                kept="the store is as it was",
                fix="train it with `knowstore train hypernetwork`, or pass --untrained to try it all the same",
            )

    def generate(
        self, passage_ids: Sequence[str], inputs: Sequence[PassageInput], *, latent: bool
    ) -> list[StoredExpert]:
        """Experts of passages as the bank takes them: Eq. 2 tensors, or latents to be materialised when mounted."""
        latents = self.hypernetwork.encode(self.llm, inputs)
        if not latent:
            return stored_experts(passage_ids, self.hypernetwork.materialise(self.llm, latents))
        return [
            StoredExpert(passage_id, "latent", _arrays(one.tensors), one.segment_ranks, sum(one.segment_ranks))
            for passage_id, one in zip(passage_ids, latents, strict=True)
        ]

    def mountable(
        self, stored: Sequence[StoredExpert], neurons: Sequence[Sequence[int] | None] | None = None
    ) -> list[Expert]:
        """Experts from the bank ready to be mounted; latents are materialised, all in one batch.

        Args:
            stored: what the bank gave.
            neurons: of each the indices of those that are needed, None for all.
        """
        import torch

        from knowstore.experts import Expert, Latent

        def tensors(one: StoredExpert) -> dict[str, torch.Tensor]:
            return {name: torch.from_numpy(array) for name, array in one.tensors.items()}

        def latent(one: StoredExpert, some: Sequence[int] | None) -> Latent:
            whole = Latent(tensors(one), one.segment_ranks)
            return whole if some is None else self.hypernetwork.part(whole, some)

        def expert(one: StoredExpert, some: Sequence[int] | None) -> Expert:
            whole = Expert("factors" if one.form == "factors" else "neurons", tensors(one), one.segment_ranks)
            return whole if some is None else whole.part(some)

        pairs = list(zip(stored, [None] * len(stored) if neurons is None else neurons, strict=True))
        latents = [latent(one, some) for one, some in pairs if one.form == "latent"]
        made = iter(self.hypernetwork.materialise(self.llm, latents) if latents else [])
        return [next(made) if one.form == "latent" else expert(one, some) for one, some in pairs]

    def neuron_weights(
        self,
        segment_ranks: Sequence[int],
        passage: tuple[str, str, Sequence[tuple[int, int]]],
        segments: Sequence[float],
        words: Sequence[tuple[int, int, float]],
    ) -> list[float] | None:
        """What each neuron of a passage's expert weighs, at the finest grain that there is.

        Args:
            segment_ranks: how many of its neurons each of its segments has.
            passage: title, text, and the characters of its sentences.
            segments: weights of its sentences.
            words: (first character, last character, weight) of its word pieces, or none.

        Returns: one weight a neuron, or None to weigh the expert as a whole.
        """
        from knowstore.experts import PassageInput, segment_weights, word_weights

        if words:
            title, text, spans = passage
            places = self.hypernetwork.neuron_spans(self.llm, PassageInput(title, text, tuple(spans)))
            if places is not None and len(places) == sum(segment_ranks):
                return word_weights(places, words)
        if len(segment_ranks) < 2 or len(segments) != len(segment_ranks):
            return None
        return segment_weights(segment_ranks, segments)

    def check_store(self, recorded: object) -> None:
        """Refuse models that are not those that a store's rows were made with.

        Raises:
            ConfigError: another retriever, LLM or hypernetwork.
        """
        if not isinstance(recorded, dict):
            return
        other = [role for role in ("llm", "retriever", "hypernetwork") if recorded.get(role) != self.fingerprints[role]]
        if other:
            raise ConfigError(
                f"the store was made with another {' and '.join(other)} than the one configured "
                f"({', '.join(f'{getattr(self.config, role)!r}' for role in other)})",
                kept="the store is as it was",
                fix="open it with the models it was made with, or change it over to these with `knowstore reexpert`",
            )


def stored_experts(passage_ids: Sequence[str], experts: Sequence[Expert]) -> list[StoredExpert]:
    """Materialised experts of passages as the bank takes them."""
    return [
        StoredExpert(passage_id, one.form, _arrays(one.tensors), one.segment_ranks, one.rank)
        for passage_id, one in zip(passage_ids, experts, strict=True)
    ]


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, npt.NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _n_words(llm: Path) -> int | None:
    """How many words the LLM in a directory knows; None where its description does not say."""
    try:
        described = json.loads((llm / "config.json").read_text("utf-8"))
        return int((described.get("text_config") or described)["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
