"""Probes that the language model makes from passages; only those whose answer stands in the passage are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from knowstore._loaded import OnProgress
from knowstore.errors import PassageError
from knowstore.evaluation import holds_answer, normalise
from knowstore.records import Probe, StoredPassage
from knowstore.store import KnowledgeStore

_BATCH = 16
_MAX_TOKENS = 40
_MIN_QUESTION_WORDS, _MAX_ANSWER_WORDS = 4, 8
_EXAMPLE = "Text: The ferry to Holm leaves at nine in the morning and needs forty minutes for the crossing."
_ASK = "A question about one fact in this text:"
_ASKED = "How long does the ferry to Holm need for the crossing?"
_ANSWER = "The answer, copied from the text:"
_ANSWERED = "forty minutes"


@dataclass(frozen=True)
class MadeProbes:
    """The probes that were kept, how many passages were tried, and why others gave none."""

    probes: tuple[Probe, ...]
    tried: int
    refused: dict[str, int]


def make_probes(
    store: KnowledgeStore,
    *,
    batch_id: int | None = None,
    limit: int | None = None,
    on_progress: OnProgress | None = None,
) -> MadeProbes:
    """Let the untouched language model ask one question of each live passage, and answer it from the passage.

    Kept is what has the form of a question with a short answer that stands in the passage and not in the question.
    Nothing is written to the store.

    Args:
        batch_id: only passages that are live since this batch.
        limit: at most so many passages.

    Raises:
        PassageError: no such passages.
    """
    passages = [one for one in store.passages() if batch_id is None or one.batch_id == batch_id][:limit]
    if not passages:
        raise PassageError(
            "no live passage to make probes from" + (f" in edit batch {batch_id}" if batch_id else ""),
            kept="the store is as it was",
            fix="run `knowstore batches` to see what each batch added",
        )
    kept: dict[str, Probe] = {}
    refused: Counter[str] = Counter()
    for first in range(0, len(passages), _BATCH):
        for probe, passage in _asked(store, passages[first : first + _BATCH]):
            problem = _problem(probe, passage) or ("asks what another one asks" if probe.question in kept else "")
            if problem:
                refused[problem] += 1
            else:
                kept[probe.question] = probe
        if on_progress is not None:
            on_progress("making probes", min(first + _BATCH, len(passages)), len(passages))
    return MadeProbes(tuple(kept.values()), len(passages), dict(refused))


def _asked(store: KnowledgeStore, passages: Sequence[StoredPassage]) -> list[tuple[Probe, StoredPassage]]:
    texts = [f"Text: {' '.join(f'{one.passage.title}. {one.passage.text}'.split())}" for one in passages]
    questions = _written(store, [(f"{_EXAMPLE}\n{_ASK} {_ASKED}\n\n{text}\n", _ASK) for text in texts])
    example = f"{_EXAMPLE}\nQuestion: {_ASKED}\n{_ANSWER} {_ANSWERED}"
    answers = _written(
        store,
        [
            (f"{example}\n\n{t}\n", f"Question: {question}\n{_ANSWER}")
            for t, question in zip(texts, questions, strict=True)
        ],
    )
    return [
        (Probe(question, (answer.rstrip(".").strip(),), "reliability", one.passage_id, one.batch_id), one)
        for question, answer, one in zip(questions, answers, passages, strict=True)
    ]


def _written(store: KnowledgeStore, prompts: Sequence[tuple[str, str]]) -> list[str]:
    from knowstore.experts import Prompt, generate

    generation = replace(store.generation, max_tokens=_MAX_TOKENS)
    made = generate(store.models.llm, [Prompt(*prompt) for prompt in prompts], None, 0, generation)
    return [one.text.strip() for one in made]


def _problem(probe: Probe, stored: StoredPassage) -> str:
    """Why a probe is not kept, or nothing."""
    (answer,), question = probe.answers, probe.question
    if not question.endswith("?") or len(question.split()) < _MIN_QUESTION_WORDS or question == _ASKED:
        return "is no question"
    if not normalise(answer) or len(answer.split()) > _MAX_ANSWER_WORDS:
        return "has no short answer"
    if not holds_answer(f"{stored.passage.title} {stored.passage.text}", [answer]):
        return "has an answer that is not in the passage"
    if holds_answer(question, [answer]):
        return "tells its answer"
    return ""
