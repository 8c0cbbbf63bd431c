"""Methods by name, with what they need beside the LLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from knowstore._loaded import LoadedModels
from knowstore.baselines.edits import Method
from knowstore.baselines.mounted import MountedExperts
from knowstore.baselines.prompted import Unedited
from knowstore.errors import ConfigError
from knowstore.training import read_rows


@dataclass(frozen=True)
class Resources:
    """What methods may use: the models, passages `{title, text}` of a `corpus` (MEMIT's statistics), and where they
    keep what they prepare."""

    models: LoadedModels
    corpus: Sequence[Path] = ()
    n_texts: int = 2_000
    n_tokens: int = 100_000
    cache_dir: Path | None = None

    def texts(self) -> list[str]:
        """The first texts of the corpus.

        Raises:
            TrainingError: a file that cannot be read.
        """
        rows = (row for path in self.corpus for row in read_rows(path))
        return list(islice((row["text"] for row in rows if isinstance(row.get("text"), str)), self.n_texts))


def make_method(name: str, resources: Resources) -> Method:
    """The method of a name out of `METHODS`.

    Raises:
        ConfigError: no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"no method {name!r}", kept="nothing was measured", fix=f"use one of {', '.join(METHODS)}")
    return METHODS[name](resources)


def _lora(resources: Resources) -> Method:
    from knowstore.baselines.lora import Lora

    return Lora()


def _memit(resources: Resources) -> Method:
    from knowstore.baselines.memit import Memit
    from knowstore.baselines.statistics import CorpusSample

    fingerprint = resources.models.fingerprints["llm"]
    return Memit(CorpusSample(resources.texts(), resources.n_tokens, resources.cache_dir, fingerprint))


METHODS: Mapping[str, Callable[[Resources], Method]] = {
    "base": lambda _resources: Unedited(),
    "rag": lambda _resources: Unedited("rag", keeps_passages=True),
    "experts": lambda resources: MountedExperts(resources.models),
    "found": lambda resources: MountedExperts(resources.models, finds_passages=True),
    "lora": _lora,
    "memit": _memit,
}
