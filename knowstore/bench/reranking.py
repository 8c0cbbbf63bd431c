"""How often the gold passage comes first among a whole corpus: by retrieval alone, and after the reranker (Table 5)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from knowstore._loaded import LoadedModels, OnProgress
from knowstore._mining import passages_table
from knowstore.bench.corpus import load_corpus, text_key
from knowstore.bench.scoring import share
from knowstore.config import ModelConfig
from knowstore.records import Passage
from knowstore.retrieval import RerankItem


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
    asked, passages = load_corpus(data, corpus, limit, seed)
    names = ("vector", "hybrid", "vector, reranked", "hybrid, reranked")
    ranks: dict[str, list[int]] = {name: [] for name in names}
    with passages_table(loaded.retriever, passages, on_progress) as table:
        for step, one in enumerate(asked):
            vector = loaded.retriever.encode_questions([one.question])[0]
            proposed = {
                "vector": table.search_vector(vector, n_candidates, at=None),
                "hybrid": table.search_hybrid(vector, one.question, n_candidates, at=None),
            }
            for name, candidates in proposed.items():
                items = [
                    RerankItem(c.title, c.text, c.segments, None, c.segment_vectors, c.vector_score) for c in candidates
                ]
                scores = [score.score for score in loaded.reranker.score(one.question, items, vector)]
                are_gold = np.array([text_key(Passage(c.text, c.title)) == text_key(one.passage) for c in candidates])
                ranks[name].append(_rank(are_gold))
                ranks[f"{name}, reranked"].append(_rank(are_gold[np.argsort(-np.array(scores), kind="stable")]))
            if on_progress is not None:
                on_progress("asking", step + 1, len(asked))
    rows = []
    for name, some in ranks.items():
        first = [float(rank == 0) for rank in some]
        rows.append(
            {
                "method": name,
                **share("top1", first, seed),
                "top4": sum(rank < 4 for rank in some) / len(some),
                "found": sum(rank < n_candidates for rank in some) / len(some),
            }
        )
    seconds = time.perf_counter() - started
    return {
        "data": data.name,
        "passages": len(passages),
        "questions": len(asked),
        "rows": rows,
        "seconds": seconds,
    }


def _rank(are_gold: np.ndarray) -> int:
    """The place of the first gold passage; behind all places when there is none."""
    return int(are_gold.argmax()) if are_gold.any() else 1 << 30
