"""What is left of purged passages: bytes in the store's files, and differences in what the model computes.

`python -m pytest tests/removal --passages 2000 --questions 200` runs it at size on the tests' tiny models; the suite
runs it small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from knowstore.config import ModelConfig, RetrievalConfig
from knowstore.prompts import question_prompt
from knowstore.records import Passage
from knowstore.store import KnowledgeStore

_PIECE_BYTES = 32  # of a text or a tensor that is searched for
_PIECES = 4  # of each


@dataclass(frozen=True)
class Left:
    """How many purged passages there were, of how many a piece of text or of the expert's numbers is in a file, and
    of how many questions the logits differ from those of a store that never held them."""

    purged: int
    leaked_texts: int
    leaked_tensors: int
    questions: int
    different_logits: int


def made_passages(n: int) -> list[Passage]:
    """Passages whose every sentence is unlike the others'."""
    random = np.random.default_rng(7)

    def word() -> str:
        return "".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), 9))

    return [
        Passage(
            f"{word()} {word()} lies on the {word()} {word()}. It was founded by {word()} {word()}.",
            f"Town {k}",
            "made",
        )
        for k in range(n)
    ]


def measure(folder: Path, models: ModelConfig, cache_dir: Path, *, n_passages: int, n_questions: int) -> Left:
    """Put passages in, purge every second one, and compare with a store that never held those.

    What stays goes in as an edit batch of its own: which passages share a forward pass decides the last bits of their
    vectors, with or without a purge.
    """
    passages = made_passages(n_passages)
    kept, purged = passages[::2], passages[1::2]
    retrieval = RetrievalConfig(null_threshold=None)
    with (
        KnowledgeStore.open(folder / "purged", models=models, cache_dir=cache_dir, retrieval=retrieval) as store,
        KnowledgeStore.open(folder / "never", models=models, cache_dir=cache_dir, retrieval=retrieval) as never,
    ):
        store.add(kept)
        store.add(purged)
        bank = store._tables.bank()
        tensors = {one.passage_id: one.data for one in bank.iter_encoded()}
        store.remove([passage.passage_id for passage in purged], purge=True)
        never.add(kept)
        others = b"".join(tensors[passage.passage_id] for passage in kept)
        files = [path.read_bytes() for path in store.layout.folder.rglob("*") if path.is_file()]
        questions = [f"Where does {passage.text.split()[0]} lie?" for passage in passages[:n_questions]]
        return Left(
            purged=len(purged),
            leaked_texts=sum(_is_in(files, passage.text.encode(), b"") for passage in purged),
            leaked_tensors=sum(_is_in(files, tensors[passage.passage_id], others) for passage in purged),
            questions=len(questions),
            different_logits=sum(not torch.equal(*_both(store, never, question)) for question in questions),
        )


def _is_in(files: Sequence[bytes], data: bytes, others: bytes) -> bool:
    """Whether a piece of the data that is not also in `others` is in a file."""
    pieces = [piece for piece in _pieces(data) if piece not in others]
    assert pieces
    return any(piece in file for piece in pieces for file in files)


def _pieces(data: bytes) -> Iterator[bytes]:
    """Some places of the data that tell it from any other."""
    for place in np.linspace(0, max(0, len(data) - _PIECE_BYTES), _PIECES).astype(int):
        piece = data[place : place + _PIECE_BYTES]
        if len(set(piece)) > _PIECE_BYTES // 4:
            yield piece


def _both(first: KnowledgeStore, second: KnowledgeStore, question: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _logits(first, question), _logits(second, question)


def _logits(store: KnowledgeStore, question: str) -> torch.Tensor:
    with store.mount(question) as llm, torch.inference_mode():
        ids = torch.tensor([llm.prompt_ids(question_prompt(question))])
        logits: torch.Tensor = llm.model(input_ids=ids).logits
        return logits.clone()
