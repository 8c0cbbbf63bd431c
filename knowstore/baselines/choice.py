"""Methods by name, with what they need beside the LLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from knowstore._loaded import LoadedModels
from knowstore.baselines.edits import EditRow, Method
from knowstore.baselines.editsets import load_edits
from knowstore.baselines.mounted import MountedExperts
from knowstore.baselines.prompted import Unedited
from knowstore.baselines.read import ReadPassages
from knowstore.errors import ConfigError
from knowstore.training import read_passages

if TYPE_CHECKING:
    from knowstore.baselines.editor import Rule


@dataclass(frozen=True)
class Resources:
    """What methods may use: the models, passages `{title, text}` of a `corpus` (MEMIT's statistics), edit sets to
    `train` on (MEND, MALMEN), of which rows that ask or teach one of `kept_out` are left out, and where methods keep
    what they prepare."""

    models: LoadedModels
    corpus: Sequence[Path] = ()
    train: Sequence[Path] = ()
    kept_out: frozenset[str] = frozenset()
    n_texts: int = 2_000
    n_tokens: int = 20_000
    n_steps: int = 500
    cache_dir: Path | None = None

    def texts(self) -> list[str]:
        """The first texts of the corpus.

        Raises:
            TrainingError: a file that cannot be read.
        """
        passages = (passage for path in self.corpus for passage in read_passages(path))
        return [passage.text for passage in islice(passages, self.n_texts)]

    def training_rows(self) -> list[EditRow]:
        """The rows of the edit sets to train on, without what is evaluated.

        Raises:
            TrainingError: a file that cannot be read.
            ConfigError: rows of no known form.
        """
        rows = [row for path in self.train for row in load_edits(path)]
        return [row for row in rows if not row.questions & self.kept_out]


def make_method(name: str, resources: Resources) -> Method:
    """The method of a name out of `METHODS`.

    Raises:
        ConfigError: no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"no method {name!r}", kept="nothing was measured", fix=f"use one of {', '.join(METHODS)}")
    return METHODS[name](resources)


def usable_methods(corpus: Sequence[Path], train: Sequence[Path]) -> dict[str, str]:
    """For each method what it lacks to be used with these files, empty for one that lacks nothing."""
    lacks = {"memit": "" if corpus else "--corpus"}
    lacks |= dict.fromkeys(("mend", "malmen"), "" if train else "--train")
    lacks["lora"] = "" if find_spec("peft") is not None else "pip install 'knowstore[baselines]'"
    return {name: lacks.get(name, "") for name in METHODS}


def _lora(resources: Resources) -> Method:
    from knowstore.baselines.lora import Lora

    return Lora()


def _memit(resources: Resources) -> Method:
    from knowstore.baselines.memit import Memit
    from knowstore.baselines.statistics import CorpusSample

    fingerprint = resources.models.fingerprints["llm"]
    return Memit(CorpusSample(resources.texts(), resources.n_tokens, resources.cache_dir, fingerprint))


def _mend(resources: Resources) -> Method:
    from knowstore.baselines.mend import summed

    return _trained("mend", summed, 1, resources)


def _malmen(resources: Resources) -> Method:
    from knowstore.baselines.malmen import least_squares

    return _trained("malmen", least_squares, 4, resources)


def _trained(name: str, rule: Rule, batch: int, resources: Resources) -> Method:
    from knowstore.baselines.trained import EditorData, EditorSettings, TrainedEditor

    fingerprint = resources.models.fingerprints["llm"]
    data = EditorData(resources.training_rows(), resources.cache_dir, fingerprint)
    return TrainedEditor(name, rule, data, EditorSettings(batch=batch, steps=resources.n_steps))


METHODS: Mapping[str, Callable[[Resources], Method]] = {
    "base": lambda _resources: Unedited(),
    "rag": lambda _resources: Unedited("rag", keeps_passages=True),
    "experts": lambda resources: MountedExperts(resources.models),
    "found": lambda resources: MountedExperts(resources.models, finds_passages=True),
    "read": lambda resources: ReadPassages(resources.models),
    "lora": _lora,
    "memit": _memit,
    "mend": _mend,
    "malmen": _malmen,
}
