"""What is left of purged passages: bytes in the store's files, and differences in what the model computes.

`python -m pytest tests/removal --passages 2000 --questions 200` runs it at size on the tests' tiny models; the suite
runs it small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
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
    """How many purged passages there were, how many of their texts and experts were found in files before, of how many
    a piece of text or of the expert's numbers is in one now, and of how many questions the logits differ from those of
    a store that never held them."""

    purged: int
    found_before: int
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
        texts = {passage.passage_id: set(_pieces(passage.text.encode())) for passage in purged}
        experts = {passage.passage_id: set(_pieces(tensors[passage.passage_id])) for passage in purged}
        others = _held([tensors[passage.passage_id] for passage in kept], set().union(*experts.values()))
        assert all(texts.values())
        assert all(pieces - others for pieces in experts.values())
        every = set().union(*texts.values(), *experts.values())
        before = _held(_files(store.layout.folder), every)
        store.remove([passage.passage_id for passage in purged], purge=True)
        never.add(kept)
        held = _held(_files(store.layout.folder), every)
        questions = [f"Where does {passage.text.split()[0]} lie?" for passage in passages[:n_questions]]
        return Left(
            purged=len(purged),
            found_before=sum(bool(pieces & before) for pieces in [*texts.values(), *experts.values()]),
            leaked_texts=sum(bool(pieces & held) for pieces in texts.values()),
            leaked_tensors=sum(bool((pieces - others) & held) for pieces in experts.values()),
            questions=len(questions),
            different_logits=sum(not torch.equal(*_both(store, never, question)) for question in questions),
        )


def _files(folder: Path) -> Iterator[bytes]:
    return (path.read_bytes() for path in folder.rglob("*") if path.is_file())


def _held(files: Iterable[bytes], pieces: Set[bytes]) -> set[bytes]:
    """Those of the pieces that are in a file, at whatever place of it: their first eight bytes are looked up at all."""
    beginnings = np.unique(np.frombuffer(b"".join(piece[:8] for piece in pieces), "<u8"))
    found = set()
    for file in files:
        for shift in range(min(8, max(0, len(file) - 7))):
            words = np.frombuffer(file, "<u8", (len(file) - shift) // 8, shift)
            nearest = beginnings[np.minimum(np.searchsorted(beginnings, words), len(beginnings) - 1)]
            starts = shift + 8 * np.flatnonzero(nearest == words)
            found |= pieces & {file[start : start + _PIECE_BYTES] for start in starts}
    return found


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
