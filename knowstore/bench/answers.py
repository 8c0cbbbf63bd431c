"""Answers end to end: a whole corpus is searched, and 1 to K of its passages are mounted or read (Figure 4); or those
of them that do not hold the answer (Table 2)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from knowstore._answering import Reader, Timer
from knowstore._loaded import LoadedModels, OnProgress
from knowstore._mining import TABLE_BATCH, passages_table
from knowstore.bench.asking import GeneratedExperts, answer_all
from knowstore.bench.corpus import GoldQuestion, load_corpus, text_key
from knowstore.bench.scoring import scored
from knowstore.config import GenerationConfig, ModelConfig, RetrievalConfig
from knowstore.evaluation import holds_answer
from knowstore.records import Hit, Mode, MountedExpert, Passage


def run_answers(
    data: Path,
    corpus: Sequence[Path],
    *,
    models: ModelConfig | None = None,
    top_ks: Sequence[int] = (1, 2, 4, 8),
    modes: Sequence[Mode] = ("experts", "rag"),
    limit: int = 100,
    seed: int = 0,
    max_tokens: int = 32,
    is_answer_free: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, object]:
    """Ask questions whose passages are looked for among a corpus and the passages of all questions of the file.

    Every method answers the same questions from the same search, greedily: `base`, the model alone; `static`, the
    static expert alone; and each mode with each K of the best passages, the null option off, and `MODE, as served`
    with the K and the null option of `ask`. Experts are generated when they are first mounted.

    Args:
        data: questions in the QA row format, `.jsonl` or `.jsonl.gz`.
        corpus: passages `{title, text}` in the same formats.
        top_ks: how many passages are mounted or read.
        modes: of `ask`.
        limit: how many questions are asked, drawn with `seed`.
        is_answer_free: of what the search finds, leave out the gold passage and all that hold an accepted answer as
            whole words: the paper's failed retrieval, in which only what experts or reading add without the answer, and
            the null option, can help.

    Returns: `passages`, `questions`, `seconds`, and `rows` of {method, k, given, held, n, em, em_ci, f1, f1_ci};
        `given` is the share of questions whose gold passage is among those mounted or read, `held` the share with a
        passage among them that holds an accepted answer, scores are from 0 to 1 with bootstrap 95 % intervals.

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: no question with a passage, a corpus without passages, or a K that the search cannot give.
    """
    started = time.perf_counter()
    loaded = LoadedModels(models or ModelConfig(), on_progress=on_progress)
    loaded.check_trained()
    asked, passages = load_corpus(data, corpus, limit, seed)
    served = RetrievalConfig()
    settings = [(str(mode), replace(served, top_k=k, null_threshold=None)) for mode in modes for k in top_ks]
    settings += [(f"{mode}, as served", served) for mode in modes]
    with passages_table(loaded.retriever, passages, on_progress) as table:
        bank = GeneratedExperts(loaded)
        generation = GenerationConfig(max_tokens=max_tokens)
        reader = Reader(table, bank, loaded, served, generation, TABLE_BATCH)
        hits = []
        for step, one in enumerate(asked):
            found = reader.retrieve(one.question, None, Timer())
            if is_answer_free:
                found = [hit for hit in found if not (_is_gold(one, hit) or _holds_answer(one, hit))]
            hits.append(found)
            bank.read(hits[-1])
            if on_progress is not None:
                on_progress("searching", step + 1, len(asked))
        bench = _Bench(reader, asked, hits, seed)
        rows = [bench.row("base", None), bench.row("static", None)]
        for step, (method, retrieval) in enumerate(settings):
            if on_progress is not None:
                on_progress(f"asking: {method}, {retrieval.top_k} passages", step, len(settings))
            rows.append(bench.row(method, retrieval))
    seconds = time.perf_counter() - started
    return {
        "data": data.name,
        "passages": len(passages),
        "questions": len(asked),
        "rows": rows,
        "seconds": seconds,
    }


class _Bench:
    """Questions with what the search found for each, best first."""

    def __init__(self, reader: Reader, asked: Sequence[GoldQuestion], hits: Sequence[Sequence[Hit]], seed: int) -> None:
        self.reader, self.asked, self.hits, self.seed = reader, asked, hits, seed

    def row(self, method: str, retrieval: RetrievalConfig | None) -> dict[str, object]:
        """Scores of a method; without `retrieval` nothing is mounted or read."""
        reader = self.reader if retrieval is None else replace(self.reader, retrieval=retrieval)
        chosen = [[] if retrieval is None else reader.weigh(some) for some in self.hits]
        mode = cast(Mode, method.split(",")[0]) if retrieval is not None else "experts"
        questions = [one.question for one in self.asked]
        texts = answer_all(reader, questions, chosen, mode, is_static=method == "static")
        pairs = list(zip(self.asked, chosen, strict=True))
        are_given = [any(_is_gold(asked, one) for one in some) for asked, some in pairs]
        are_held = [any(_holds_answer(asked, one) for one in some) for asked, some in pairs]
        return {
            "method": method,
            "k": 0 if retrieval is None else retrieval.top_k,
            "given": sum(are_given) / len(are_given),
            "held": sum(are_held) / len(are_held),
            **scored(texts, [one.answers for one in self.asked], self.seed),
        }


def _is_gold(asked: GoldQuestion, one: Hit | MountedExpert) -> bool:
    return text_key(Passage(one.text, one.title)) == text_key(asked.passage)


def _holds_answer(asked: GoldQuestion, one: Hit | MountedExpert) -> bool:
    return holds_answer(f"{one.title} {one.text}", asked.answers)
