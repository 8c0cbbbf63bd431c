"""Locality: what becomes of answers that the model knows by itself when an expert is mounted that is not about them."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from knowstore._answering import Reader, Timer, scored_hit
from knowstore._loaded import LoadedModels, OnProgress
from knowstore._mining import TABLE_BATCH, passages_table
from knowstore.bench.asking import GeneratedExperts, answer_all
from knowstore.bench.corpus import Question, load_passages, names_of, read_questions
from knowstore.bench.scoring import share
from knowstore.config import GenerationConfig, ModelConfig, RetrievalConfig
from knowstore.errors import ConfigError
from knowstore.evaluation import holds_answer, normalise
from knowstore.records import MountedExpert, Passage
from knowstore.retrieval import RerankItem
from knowstore.sources import sentence_spans


@dataclass(frozen=True)
class _Known(Question):
    answer: str


def run_locality(
    data: Sequence[Path],
    corpus: Sequence[Path],
    *,
    models: ModelConfig | None = None,
    limit: int = 300,
    seed: int = 0,
    max_tokens: int = 32,
    on_progress: OnProgress | None = None,
) -> dict[str, object]:
    """Ask what the model answers by itself again, with something mounted that is not about the question.

    Controls: `static`, the static expert alone; `wrong`, the expert of a passage drawn from the corpus, the null option
    off; `as served`, what `ask` finds in the corpus, with its null option.

    Args:
        data: files of rows {question or prompt, answers}, `.jsonl` or `.jsonl.gz`.
        corpus: passages `{title, text}` in the same formats.
        limit: questions of each file, drawn with `seed`; those whose answer the model alone gives are kept.

    Returns: `rows` of {data, control, asked, n, mounted, kept, kept_ci, same, same_ci}: of `asked` questions the model
        alone answers `n`; of these `kept` still hold the accepted answer and `same` are the same words, and
        something was `mounted` for a share of them; shares from 0 to 1 with bootstrap 95 % intervals.

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: no question, a corpus without passages, or a file of which the model answers nothing.
    """
    started = time.perf_counter()
    loaded = LoadedModels(models or ModelConfig(), on_progress=on_progress)
    loaded.check_trained()
    passages = load_passages(corpus)
    rows: list[dict[str, object]] = []
    with passages_table(loaded.retriever, passages, on_progress) as table:
        bank = GeneratedExperts(loaded)
        generation = GenerationConfig(max_tokens=max_tokens)
        reader = Reader(table, bank, loaded, RetrievalConfig(), generation, TABLE_BATCH)
        for path, name in zip(data, names_of(data), strict=True):
            if on_progress is not None:
                on_progress(f"asking: {name}", len(rows), 3 * len(data))
            asked = _questions(path, limit, seed)
            known = _known(reader, asked, path)
            chosen: dict[str, list[list[MountedExpert]]] = {
                "static": [[] for _ in known],
                "wrong": _wrong(reader, bank, known, passages, seed),
                "as served": _served(reader, bank, known),
            }
            for control, some in chosen.items():
                texts = answer_all(
                    reader, [one.question for one in known], some, is_static=control == "static", batch_size=1
                )
                mounted = 1.0 if control == "static" else sum(bool(each) for each in some) / len(some)
                described = {"data": name, "control": control, "asked": len(asked), "n": len(known)}
                rows.append(described | {"mounted": mounted} | _compared(known, texts, seed))
    return {"rows": rows, "passages": len(passages), "seconds": time.perf_counter() - started}


def _questions(path: Path, limit: int, seed: int) -> list[Question]:
    asked = read_questions(path)
    random.Random(seed).shuffle(asked)
    return asked[:limit]


def _known(reader: Reader, asked: Sequence[Question], path: Path) -> list[_Known]:
    """The questions whose accepted answer the model alone gives."""
    texts = answer_all(reader, [one.question for one in asked], [[] for _ in asked], batch_size=1)
    known = [
        _Known(one.question, one.answers, text)
        for one, text in zip(asked, texts, strict=True)
        if holds_answer(text, one.answers)
    ]
    if not known:
        raise ConfigError(
            f"the model alone answers none of {len(asked)} questions of {path}", kept="nothing was measured",
            fix="give questions that it can answer, or more of them with --limit",
        )  # fmt: skip
    return known


def _wrong(
    reader: Reader, bank: GeneratedExperts, known: Sequence[_Known], passages: Sequence[Passage], seed: int
) -> list[list[MountedExpert]]:
    """For each question a passage that holds none of its answers, weighed as the reranker does."""
    draw = random.Random(seed)
    always = replace(reader, retrieval=replace(reader.retrieval, null_threshold=None))
    drawn = [_other(draw.sample(passages, min(50, len(passages))), one.answers) for one in known]
    spans = [tuple(sentence_spans(passage.text)) for passage in drawn]
    models = reader.models
    vectors = models.retriever.encode_passages(drawn, spans)
    questions = models.retriever.encode_questions([one.question for one in known])
    chosen = []
    for one, passage, some, (vector, each), asked in zip(known, drawn, spans, vectors, questions, strict=True):
        item = RerankItem(passage.title, passage.text, some, vector, each)
        [score] = models.reranker.score(one.question, [item], asked)
        hit = scored_hit(passage.passage_id, item, score, TABLE_BATCH)
        bank.read([hit])
        chosen.append(always.weigh([hit]))
    return chosen


def _other(passages: Sequence[Passage], answers: Sequence[str]) -> Passage:
    """The first that holds none of the answers."""
    return next((p for p in passages if not holds_answer(f"{p.title} {p.text}", answers)), passages[0])


def _served(reader: Reader, bank: GeneratedExperts, known: Sequence[_Known]) -> list[list[MountedExpert]]:
    chosen = []
    for one in known:
        hits = reader.retrieve(one.question, None, Timer())
        bank.read(hits)
        chosen.append(reader.weigh(hits))
    return chosen


def _compared(known: Sequence[_Known], texts: Sequence[str], seed: int) -> dict[str, object]:
    kept = [float(holds_answer(text, one.answers)) for text, one in zip(texts, known, strict=True)]
    same = [float(normalise(text) == normalise(one.answer)) for text, one in zip(texts, known, strict=True)]
    return share("kept", kept, seed) | share("same", same, seed)
