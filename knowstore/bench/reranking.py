"""How often the gold passage comes first among a whole corpus: by retrieval alone, and after the reranker (Table 5)."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from knowstore._loaded import LoadedModels, OnProgress
from knowstore._mining import passages_table
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError
from knowstore.evaluation import bootstrap_interval
from knowstore.records import Passage
from knowstore.retrieval import RerankItem
from knowstore.training import read_rows


def run_rerank(
    data: Path,
    corpus: Sequence[Path],
    *,
    models: ModelConfig | None = None,
    limit: int = 200,
    n_candidates: int = 20,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> dict[str, object]:
    """Look for the gold passages of questions among a corpus and the gold passages of all questions of the file.

    Args:
        data: questions in the QA row format, `.jsonl` or `.jsonl.gz`.
        corpus: passages `{title, text}` in the same formats.
        limit: how many questions are asked, drawn with `seed`.
        n_candidates: passages that a search proposes and the reranker orders.

    Returns: `passages`, `questions`, `seconds`, and `rows` of {method, top1, top1_ci, top4, found}: by vectors (Eq. 7)
        and by hybrid search alone, and each after the reranker; shares from 0 to 1 with bootstrap 95 % intervals.
        `found` is the share of questions whose gold passage is among the candidates. A passage that is the gold one
        but for blanks and case counts as it.

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: no question with a passage, or a corpus without passages.
    """
    started = time.perf_counter()
    loaded = LoadedModels(models or ModelConfig(), on_progress=on_progress)
    asked = [row for row in read_rows(data) if isinstance(row.get("question"), str) and _is_passage(row.get("passage"))]
    if not asked:
        raise ConfigError(
            f"{data} has no question with a passage", kept="nothing was measured",
            fix="give a file in the QA row format: question, answers, passage: {title, text}",
        )  # fmt: skip
    gold = [Passage(row["passage"]["text"], row["passage"]["title"]) for row in asked]
    rest = []
    for path in corpus:
        found = [Passage(row["text"], row["title"]) for row in read_rows(path) if _is_passage(row)]
        if not found:
            raise ConfigError(
                f"{path} has no passages",
                kept="nothing was measured",
                fix="give rows {title, text}, a JSON object a line",
            )
        rest += found
    passages = list({_key(passage): passage for passage in [*rest, *gold]}.values())
    order = list(range(len(asked)))
    random.Random(seed).shuffle(order)
    names = ("vector", "hybrid", "vector, reranked", "hybrid, reranked")
    ranks: dict[str, list[int]] = {name: [] for name in names}
    with passages_table(loaded.retriever, passages, on_progress) as table:
        for step, index in enumerate(order[:limit]):
            question, key = asked[index]["question"], _key(gold[index])
            vector = loaded.retriever.encode_questions([question])[0]
            proposed = {
                "vector": table.search_vector(vector, n_candidates, at=None),
                "hybrid": table.search_hybrid(vector, question, n_candidates, at=None),
            }
            for name, candidates in proposed.items():
                items = [
                    RerankItem(c.title, c.text, c.segments, None, c.segment_vectors, c.vector_score) for c in candidates
                ]
                scores = [one.score for one in loaded.reranker.score(question, items, vector)]
                are_gold = np.array([_key(Passage(c.text, c.title)) == key for c in candidates])
                ranks[name].append(_rank(are_gold))
                ranks[f"{name}, reranked"].append(_rank(are_gold[np.argsort(-np.array(scores), kind="stable")]))
            if on_progress is not None:
                on_progress("asking", step + 1, min(limit, len(order)))
    rows = []
    for name, some in ranks.items():
        first = [float(rank == 0) for rank in some]
        rows.append(
            {
                "method": name,
                "top1": sum(first) / len(some),
                "top1_ci": bootstrap_interval(first, seed=seed),
                "top4": sum(rank < 4 for rank in some) / len(some),
                "found": sum(rank < n_candidates for rank in some) / len(some),
            }
        )
    seconds = time.perf_counter() - started
    return {
        "data": data.name,
        "passages": len(passages),
        "questions": len(order[:limit]),
        "rows": rows,
        "seconds": seconds,
    }


def _is_passage(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("text"), str) and isinstance(row.get("title"), str)


def _rank(are_gold: np.ndarray) -> int:
    """The place of the first gold passage; behind all places when there is none."""
    return int(are_gold.argmax()) if are_gold.any() else 1 << 30


def _key(passage: Passage) -> str:
    return " ".join(passage.text.lower().split())
