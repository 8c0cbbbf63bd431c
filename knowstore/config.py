"""Settings of each part as frozen dataclasses, checked when made; standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from knowstore.errors import ConfigError

Codec = Literal["float32", "float16", "int8", "latent"]
Search = Literal["vector", "text", "hybrid"]
Index = Literal["lance", "faiss"]
Where = Literal["all", "question"]
Grain = Literal["words", "sentences", "passages"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _check(is_right: bool, what: str, fix: str) -> None:
    if not is_right:
        raise ConfigError(what, kept="nothing was changed", fix=fix)


def _check_choice(name: str, value: str, choices: object) -> None:
    _check(value in get_args(choices), f"{name} is {value!r}", f"use one of {', '.join(get_args(choices))}")


@dataclass(frozen=True)
class ModelConfig:
    """Which models, where and in what precision.

    A reference is `default` (an installed package or what ships with knowstore), a local
    directory, or a hub id. `device` `auto` takes CUDA, then MPS, then CPU; a device that is
    named and absent is an error. The default `reader` serves the default LLM; others read prompts without
    one, as with `none`, until one is trained for them. `dtype` `auto` is bfloat16 where the device computes in it,
    else float32.
    """

    llm: str = "default"
    retriever: str = "default"
    reranker: str = "default"
    hypernetwork: str = "default"
    reader: str = "default"
    device: Device = "auto"
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        _check_choice("device", self.device, Device)
        _check_choice("dtype", self.dtype, Dtype)


@dataclass(frozen=True)
class SplitConfig:
    """How documents become passages: about `words` words, cut at sentence ends (DPR's form)."""

    words: int = 100
    max_file_bytes: int = 512 * 1024 * 1024

    def __post_init__(self) -> None:
        _check(self.words >= 10, f"words is {self.words}", "use at least 10 words per passage")


@dataclass(frozen=True)
class BankConfig:
    """How experts are kept: the codec, and how many bytes of decoded experts stay in memory."""

    codec: Codec = "latent"
    cache_bytes: int = 512 * 1024 * 1024

    def __post_init__(self) -> None:
        _check_choice("codec", self.codec, Codec)
        _check(self.cache_bytes >= 0, f"cache_bytes is {self.cache_bytes}", "use 0 or more")


@dataclass(frozen=True)
class RayConfig:
    """Models on workers of a Ray cluster: `workers` processes, each with the models and a core (or a GPU, where the
    cluster has one) of its own; None takes as many as there are. `address` is that of a running cluster, as in
    `ray start`; None starts one on this machine and ends it afterwards.
    """

    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        _check(self.workers is None or self.workers >= 1, f"workers is {self.workers}", "use at least 1")


@dataclass(frozen=True)
class RetrievalConfig:
    """How passages are found for a question.

    `n_candidates` passages are proposed (Eq. 7), the reranker keeps the best `top_k`, whose
    scores (which come divided by the temperature that fits them) over `temperature` are softmaxed to
    relevance (Eq. 9). When no kept passage
    scores at least `null_threshold`, nothing is mounted: `auto` takes the
    reranker's own threshold where it has one, None switches the null option off.

    Of passages of one title that share at least `twin_overlap` of their words, or are short statements that differ in
    one place, only those of the newest edit batch are mounted or read, unless the question tells them apart by a name
    or number that one of them lacks; None uses all.

    In mode `hybrid`, which mounts all kept passages, only the best `n_read` of them are read in the prompt as well, or
    all when None: a small model is led astray by what else it reads more than by what else is mounted.

    `grain` says what has a relevance of its own within a passage: `words` where reranker and hypernetwork tell them
    apart, else `sentences`; `passages` is the paper's Eq. 9.
    """

    n_candidates: int = 20
    top_k: int = 4
    temperature: float = 1.0
    null_threshold: float | Literal["auto"] | None = "auto"
    search: Search = "hybrid"
    index: Index = "lance"
    grain: Grain = "words"
    twin_overlap: float | None = 0.6
    n_read: int | None = 1

    def __post_init__(self) -> None:
        _check_choice("search", self.search, Search)
        _check_choice("index", self.index, Index)
        _check_choice("grain", self.grain, Grain)
        _check(1 <= self.top_k <= self.n_candidates, f"top_k is {self.top_k} with n_candidates {self.n_candidates}",
               "use 1 <= top_k <= n_candidates")  # fmt: skip
        _check(self.temperature > 0, f"temperature is {self.temperature}", "use a temperature above 0")
        _check(self.twin_overlap is None or 0 < self.twin_overlap <= 1, f"twin_overlap is {self.twin_overlap}",
               "use a share above 0, or None")  # fmt: skip
        _check(self.n_read is None or self.n_read >= 1, f"n_read is {self.n_read}", "use at least 1, or None for all")


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are generated: greedily until the model stops or a line ends, by default.

    The model cannot stop before `min_tokens`, and is stopped after `max_tokens`. With `one_turn` a neuron of an expert
    whose word was written adds nothing more (`experts.Turns`), but with several beams; where that is a near thing,
    rounding decides, so an answer can differ with the batch it is written in. Without, experts act as Eq. 6 has it to
    the end.
    """

    max_tokens: int = 32
    min_tokens: int = 0
    do_sample: bool = False
    sampling_temperature: float = 1.0
    n_beams: int = 1
    where: Where = "question"
    one_turn: bool = True

    def __post_init__(self) -> None:
        _check_choice("where", self.where, Where)
        _check(self.max_tokens >= 1, f"max_tokens is {self.max_tokens}", "use at least 1")
        _check(0 <= self.min_tokens <= self.max_tokens,
               f"min_tokens is {self.min_tokens} with max_tokens {self.max_tokens}",
               "use 0 <= min_tokens <= max_tokens")  # fmt: skip
        _check(self.n_beams >= 1, f"n_beams is {self.n_beams}", "use at least 1")


@dataclass(frozen=True)
class Filters:
    """Which passages may be found; each given field must match (None or 0 means any).

    `source` and `title` are exact, or a prefix when they end in `*`; dates are ISO 8601, inclusive.
    """

    source: str | None = None
    title: str | None = None
    batch_id: int | None = None
    date_from: str | None = None
    date_to: str | None = None
