"""What experts take on disk in each codec, and what the codec costs in answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import get_args

from knowstore._loaded import OnProgress
from knowstore.bank import ExpertBank, StoredExpert
from knowstore.bench.controls import ControlBench, open_benches
from knowstore.bench.made import BATCH_ID, MadeExperts
from knowstore.config import Codec, ModelConfig
from knowstore.evaluation import bootstrap_interval, exact_match, token_f1

CODECS: tuple[Codec, ...] = get_args(Codec)
_EXACT: Codec = "float32"


def run_codecs(
    data: Sequence[Path],
    *,
    models: ModelConfig | None = None,
    limit: int = 200,
    seed: int = 0,
    max_tokens: int = 32,
    on_progress: OnProgress | None = None,
) -> dict[str, object]:
    """Ask the questions of QA files with their passages' experts, kept in a bank by each codec and read back.

    Args:
        data: files in the QA row format, `.jsonl` or `.jsonl.gz`.
        limit: questions of each file, drawn with `seed`.

    Returns: `rows` of {data, codec, n, bytes_per_passage, em, em_lost, em_lost_ci, f1, same_answers}, and `seconds`;
        `em_lost` is what float32 scores on the same questions less what the codec scores, with its bootstrap 95 %
        interval, and `same_answers` the share of answers that are those with float32.

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: fewer than two questions.
    """
    started = time.perf_counter()
    benches = open_benches(data, models, limit, seed, max_tokens, on_progress)
    rows = [row for bench in benches for row in _rows(bench, on_progress)]
    return {"rows": rows, "seconds": time.perf_counter() - started}


def _rows(bench: ControlBench, on_progress: OnProgress | None) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    exact: list[str] = []
    exact_em: list[float] = []
    everything = list(range(len(bench.cases)))
    for step, codec in enumerate((_EXACT, *(codec for codec in CODECS if codec != _EXACT))):
        if on_progress is not None:
            on_progress(f"{bench.name}: {codec}", step, len(CODECS))
        n_bytes, bench.stored = _kept(bench.made, codec)
        texts = bench.answers(bench.models.hypernetwork.config.kind, everything, list(everything))
        em = [exact_match(text, case.answers) for text, case in zip(texts, bench.cases, strict=True)]
        f1 = [token_f1(text, case.answers) for text, case in zip(texts, bench.cases, strict=True)]
        exact, exact_em = exact or texts, exact_em or em
        lost = [before - after for before, after in zip(exact_em, em, strict=True)]
        rows.append(
            {
                "data": bench.name, "codec": codec, "n": len(em), "bytes_per_passage": n_bytes, "em": fmean(em),
                "em_lost": fmean(lost), "em_lost_ci": bootstrap_interval(lost, seed=bench.seed), "f1": fmean(f1),
                "same_answers": fmean(one == other for one, other in zip(exact, texts, strict=True)),
            }
        )  # fmt: skip
    return rows


def _kept(made: MadeExperts, codec: Codec) -> tuple[float, list[StoredExpert]]:
    """The mean bytes of experts, and what a bank of this codec gives back of them."""
    encoded = made.encoded(codec)
    with TemporaryDirectory(prefix="knowstore-codecs-", ignore_cleanup_errors=True) as folder:
        bank = ExpertBank.open(folder, fingerprint=made.fingerprint, create=True)
        bank.add_encoded(encoded, BATCH_ID)
        ids = [expert.passage_id for expert in encoded]
        found = bank.get(list(dict.fromkeys(ids)))
    return fmean(len(expert.data) for expert in encoded), [found[passage_id] for passage_id in ids]


def codec_sizes(made: MadeExperts) -> list[dict[str, object]]:
    """Rows of {codec, n, bytes_per_passage}: the mean of what each codec writes, without the table around it."""
    return [
        {
            "codec": codec, "n": len(made.latents),
            "bytes_per_passage": fmean(len(expert.data) for expert in made.encoded(codec)),
        }
        for codec in CODECS
    ]  # fmt: skip
