"""How fast a store answers, takes passages in and reads experts, beside what one would use instead, in one run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from knowstore._loaded import OnProgress
from knowstore.bench.answering import measure_answers
from knowstore.bench.codecs import codec_sizes
from knowstore.bench.injection import measure_ingest
from knowstore.bench.made import MadeExperts
from knowstore.bench.reads import measure_reads
from knowstore.bench.startup import measure_startup
from knowstore.config import BankConfig, Codec, GenerationConfig, ModelConfig, RetrievalConfig
from knowstore.errors import ConfigError
from knowstore.records import Passage
from knowstore.store import KnowledgeStore
from knowstore.training import read_passages

_LEAST = 24
_N_ENCODED = 32  # passages whose experts are measured in every codec


@dataclass(frozen=True)
class SpeedConfig:
    """What `run_speed` measures.

    Answers of `n_tokens` tokens with each of `ks` passages, `rounds` times; ingest of `n_passages`; banks of `sizes`
    experts, none if it is empty; experts kept by `codec`.
    """

    n_passages: int = 128
    ks: tuple[int, ...] = (1, 4, 8)
    rounds: int = 5
    n_tokens: int = 16
    sizes: tuple[int, ...] = (1_000,)
    codec: Codec = BankConfig.codec
    seed: int = 0


def run_speed(
    corpus: Path,
    *,
    models: ModelConfig | None = None,
    config: SpeedConfig | None = None,
    command: Sequence[str] = (),
    on_progress: OnProgress | None = None,
    cache_dir: Path | None = None,
) -> dict[str, object]:
    """Measure a store that is made for it in a temporary folder, and everything in turn with what it is compared with.

    Args:
        corpus: passages {title, text}, `.jsonl` or `.jsonl.gz`.
        command: what starts `knowstore`, as arguments of a process; start-up is left out without it.

    Returns: `ratios` of {name, ratio, low, high}, medians of seconds with bootstrap 95 % intervals (`A_over_B` is the
        time of A divided by that of B); `answers`, `reads` and `codecs`, rows; `ingest`, `startup`, `device`, `threads`
        and `seconds`. In `answers`, `first_token_s` and `total_s` count from the chosen passages on, `ask_` with
        retrieval and reranking before.

    Raises:
        TrainingError: the corpus cannot be read.
        ConfigError: it has too few passages, or fewer than one of `ks`.
    """
    import torch

    started = time.perf_counter()
    config = config or SpeedConfig()
    passages = _passages(corpus, config.n_passages)
    most = max(config.ks, default=0)
    if most > len(passages):
        raise ConfigError(
            f"answers with {most} passages cannot be measured with {len(passages)} passages of {corpus}",
            kept="nothing was measured",
            fix="use smaller numbers of passages behind an answer, or ingest more passages",
        )
    retrieval = RetrievalConfig(
        n_candidates=max(most, RetrievalConfig.n_candidates), top_k=most, null_threshold=None, twin_overlap=None
    )
    with (
        TemporaryDirectory(prefix="knowstore-speed-", ignore_cleanup_errors=True) as folder,
        KnowledgeStore.open(
            folder, models=models or ModelConfig(), bank=BankConfig(codec=config.codec), retrieval=retrieval,
            generation=GenerationConfig(max_tokens=config.n_tokens, min_tokens=config.n_tokens), cache_dir=cache_dir,
        ) as store,
    ):  # fmt: skip
        store.models.check_trained()
        ingest, ratios = measure_ingest(store, passages, seed=config.seed, on_progress=on_progress)
        questions = [_question(passage) for passage in passages]
        startup = measure_startup(command, Path(folder), questions[0]) if command else {}
        reader = store._reader()
        assert reader is not None  # there are passages
        answers, answer_ratios = measure_answers(
            reader, questions, config.ks, rounds=config.rounds, seed=config.seed, on_progress=on_progress
        )
        made = MadeExperts.make(store.models, passages[:_N_ENCODED])
        device = store.models.device
    reads: list[dict[str, object]] = []
    read_ratios: list[dict[str, object]] = []
    if config.sizes:
        reads, read_ratios = measure_reads(made.encoded(config.codec), config.sizes, seed=config.seed)
    return {
        "ratios": answer_ratios + ratios + read_ratios,
        "answers": answers,
        "ingest": ingest,
        "reads": reads,
        "codecs": codec_sizes(made),
        "startup": startup,
        "device": device,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
    }


def _passages(path: Path, n: int) -> list[Passage]:
    """The first n different passages of a file."""
    found: dict[str, Passage] = {}
    for passage in read_passages(path):
        found.setdefault(passage.passage_id, passage)
        if len(found) == n:
            break
    if len(found) < _LEAST:
        raise ConfigError(
            f"{path} has {len(found)} passages, speed is measured with at least {_LEAST}",
            kept="nothing was measured",
            fix="give rows {title, text}, a JSON object a line",
        )
    return list(found.values())


def _question(passage: Passage) -> str:
    return f"What is {passage.title or ' '.join(passage.text.split()[:4])}?"
