"""What one would use instead, in one run: LangChain and LlamaIndex on LanceDB with the same models and passages."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from knowstore._loaded import LoadedModels, OnProgress
from knowstore.bench import systems
from knowstore.bench.corpus import GoldQuestion, load_corpus, text_key
from knowstore.bench.scoring import scored, share
from knowstore.bench.systems import Measured, PromptName, SystemConfig, SystemProcess
from knowstore.config import ModelConfig, RetrievalConfig
from knowstore.errors import ConfigError
from knowstore.evaluation import holds_answer, median_ratio
from knowstore.models import choose_device
from knowstore.records import Passage

_NEEDED = (
    "langchain_core", "langchain_classic", "langchain_lancedb", "llama_index.core", "llama_index.llms.huggingface",
    "llama_index.vector_stores.lancedb", "pandas",
)  # fmt: skip
_SYSTEMS = {
    "experts": systems.experts,
    "rag": systems.rag,
    "rag, zero-shot": systems.rag_zero_shot,
    "hybrid": systems.hybrid,
    "langchain": systems.langchain,
    "llamaindex": systems.llama_index,
}
_PEERS = ("langchain", "llamaindex")
_INGESTING = ("experts", *_PEERS)  # the other modes read the store that `experts` fills
_WARM_UP = 8  # passages

Way = tuple[str, PromptName]
WAYS: tuple[Way, ...] = (
    *((name, "short") for name in _SYSTEMS if name not in _PEERS),
    *((name, prompt) for name in _PEERS for prompt in ("short", "own")),
)
"""Every system with every prompt that it is asked with."""


@dataclass(frozen=True)
class PeersConfig:
    """What `run_peers` measures: `limit` questions among `n_passages` passages, which are added in `n_parts`; `top_k`
    passages behind an answer of at most `max_tokens`. `seed` draws questions, passages and the order of everything."""

    limit: int = 40
    n_passages: int = 1000
    n_parts: int = 5
    top_k: int = RetrievalConfig.top_k
    max_tokens: int = 32
    seed: int = 0


def lacking_peers() -> list[str]:
    """The modules of the extra `peers` that are not installed."""
    return [name for name in _NEEDED if not _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of a package that the module would be in
        return False


def run_peers(
    data: Path,
    corpus: Sequence[Path],
    *,
    models: ModelConfig | None = None,
    config: PeersConfig | None = None,
    on_progress: OnProgress | None = None,
    cache_dir: Path | None = None,
) -> dict[str, object]:
    """Give the same passages and questions to a store and to LangChain and LlamaIndex, each in a process of its own.

    All have the same retriever and language model and decode greedily. The peers find passages as their documentation
    shows it, by vectors alone, and are asked with the store's prompt (`short`), to an end of sequence or line, and with
    their own default one (`own`), by the model's chat template if it has one, to an end of sequence. The store's modes
    are asked as `ask` serves them, `rag, zero-shot` without the tuned reader. Passages are given whole, no splitter is
    used. Every part is added to one system after another and every question asked in every way, in another order each
    time.

    Args:
        data: questions in the QA row format, `.jsonl` or `.jsonl.gz`.
        corpus: passages `{title, text}` in the same formats, of which those are drawn that are added to the gold ones
            of the questions.

    Returns: `rows` of {method, prompt, k, given, n, em, em_ci, f1, f1_ci, holds, holds_ci, words, answer_s,
        answer_s_quartiles, peak_bytes}: `given` is the share of questions whose gold passage is behind the answer,
        `em` and `f1` are of the first line of an answer, `holds` is the share of those that hold an accepted one
        anywhere, `words` their mean length, `answer_s` the median seconds of a question, search included; `ingest` of
        {method, passages, passages_per_s, peak_bytes, size_bytes}; `ratios` of seconds, {name, ratio, low, high};
        `passages`, `questions`, `device`, `seconds`. `peak_bytes` is the most memory of the system's process, models
        included.

    Raises:
        ConfigError: the extra `peers` is not installed, no question with a passage, a corpus without passages or fewer
            passages than are to be added, or a process that ended.
        TrainingError: a file that cannot be read.
    """
    started = time.perf_counter()
    config, models = config or PeersConfig(), models or ModelConfig()
    if lacking := lacking_peers():
        raise ConfigError(
            f"{', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed",
            kept="nothing was measured",
            fix="pip install 'knowstore[peers]'",
        )
    asked, passages = _drawn(data, corpus, config)
    loaded = LoadedModels(models, on_progress=on_progress, cache_dir=cache_dir)
    loaded.check_trained()
    loaded.path("llm")  # converted once, before each process loads it
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="knowstore-peers-", ignore_cleanup_errors=True)))
        run = _Run(config, random.Random(config.seed), on_progress)
        for name, make in _SYSTEMS.items():
            place = folder / (name if name in _INGESTING else "experts")
            system = SystemConfig(place, models, config.top_k, config.max_tokens, cache_dir)
            run.processes[name] = stack.enter_context(SystemProcess(name, make, system))
        run.add(passages)
        run.ask([one.question for one in asked])
        sizes = {name: _size_bytes(folder / name) for name in _INGESTING}
    return {
        "data": data.name,
        "passages": len(passages),
        "questions": len(asked),
        "rows": [run.row(way, asked) for way in WAYS],
        "ingest": [run.ingest_row(name, sizes[name]) for name in _INGESTING],
        "ratios": run.ratios(),
        "device": choose_device(models.device),
        "seconds": time.perf_counter() - started,
    }


def _drawn(data: Path, corpus: Sequence[Path], config: PeersConfig) -> tuple[list[GoldQuestion], list[Passage]]:
    """Questions, and their passages among others, in a drawn order; questions on a text share its passage."""
    asked, passages = load_corpus(data, corpus, config.limit, config.seed)
    gold = {text_key(one.passage): one.passage for one in asked}
    others = [passage for passage in passages if text_key(passage) not in gold]
    least = max(len(gold), _WARM_UP + config.n_parts)
    if not least <= config.n_passages <= len(passages):
        raise ConfigError(
            f"{config.n_passages} passages are to be added, there are {len(passages)} and {least} are needed",
            kept="nothing was measured",
            fix="give another number of passages, or a larger corpus",
        )
    drawn = random.Random(config.seed)
    chosen = [*gold.values(), *drawn.sample(others, config.n_passages - len(gold))]
    drawn.shuffle(chosen)
    return [replace(one, passage=gold[text_key(one.passage)]) for one in asked], chosen


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclass
class _Run:
    """The processes, and what was measured of them."""

    config: PeersConfig
    drawn: random.Random
    on_progress: OnProgress | None
    processes: dict[str, SystemProcess] = field(default_factory=dict)
    n_added: int = 0
    added: dict[str, list[Measured]] = field(default_factory=dict)
    answered: dict[Way, list[Measured]] = field(default_factory=dict)

    def add(self, passages: Sequence[Passage]) -> None:
        """Add passages to those systems that take any, a few that warm up first."""
        rest, n_parts = passages[_WARM_UP:], self.config.n_parts
        self.n_added = len(rest)
        for name in _INGESTING:
            self.processes[name].start()
            self.processes[name].add(passages[:_WARM_UP])
        for number in range(n_parts):
            for name in self.drawn.sample(_INGESTING, len(_INGESTING)):
                self.added.setdefault(name, []).append(self.processes[name].add(rest[number::n_parts]))
            if self.on_progress is not None:
                self.on_progress("ingesting", number + 1, n_parts)

    def ask(self, questions: Sequence[str]) -> None:
        """Ask every question in every way; the first one is asked once more before, to warm up."""
        for name in _SYSTEMS.keys() - _INGESTING:
            self.processes[name].start()
        for name, prompt in WAYS:
            self.processes[name].ask(questions[0], prompt)
        for number, question in enumerate(questions):
            for name, prompt in self.drawn.sample(WAYS, len(WAYS)):
                self.answered.setdefault((name, prompt), []).append(self.processes[name].ask(question, prompt))
            if self.on_progress is not None:
                self.on_progress("asking", number + 1, len(questions))

    def row(self, way: Way, asked: Sequence[GoldQuestion]) -> dict[str, object]:
        taken = self.answered[way]
        told = [one.told for one in taken if one.told is not None]
        texts = [one.text for one in told]
        accepted = [one.answers for one in asked]
        are_given = [one.passage.passage_id in some.passage_ids for one, some in zip(asked, told, strict=True)]
        holds = [float(holds_answer(text, answers)) for text, answers in zip(texts, accepted, strict=True)]
        quartiles = np.quantile([one.seconds for one in taken], (0.25, 0.5, 0.75))
        return {
            "method": way[0],
            "prompt": way[1],
            "k": self.config.top_k,
            "given": sum(are_given) / len(are_given),
            **scored([text.strip().split("\n", 1)[0] for text in texts], accepted, self.config.seed),
            **share("holds", holds, self.config.seed),
            "words": float(np.mean([len(text.split()) for text in texts])),
            "answer_s": float(quartiles[1]),
            "answer_s_quartiles": (float(quartiles[0]), float(quartiles[2])),
            "peak_bytes": _peak(taken),
        }

    def ingest_row(self, name: str, size_bytes: int) -> dict[str, object]:
        taken = self.added[name]
        rate = self.n_added / sum(one.seconds for one in taken)
        return {
            "method": name, "passages": self.n_added, "passages_per_s": rate, "peak_bytes": _peak(taken),
            "size_bytes": size_bytes,
        }  # fmt: skip

    def ratios(self) -> list[dict[str, object]]:
        """Seconds of peers divided by those of the store's modes, and of ingest the other way round."""
        found: list[dict[str, object]] = []

        def add(name: str, above: Sequence[Measured], below: Sequence[Measured]) -> None:
            seconds = [[one.seconds for one in some] for some in (above, below)]
            ratio, low, high = median_ratio(*seconds, seed=self.config.seed)
            found.append({"name": name, "ratio": ratio, "low": low, "high": high})

        for peer in _PEERS:
            add(f"ingest_experts_over_{peer}", self.added["experts"], self.added[peer])
        for peer, prompt in [way for way in WAYS if way[0] in _PEERS]:
            for mode in ("experts", "rag"):
                add(
                    f"answer_{peer}_{prompt}_over_{mode}", self.answered[peer, prompt], self.answered[mode, "short"]
                )  # fmt: skip
        return found


def _peak(taken: Sequence[Measured]) -> int | None:
    peaks = [one.peak_bytes for one in taken if one.peak_bytes is not None]
    return max(peaks) if peaks else None
