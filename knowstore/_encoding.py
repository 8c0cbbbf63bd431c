"""Passages become rows and experts: batches by tokens, the models' forwards, and the engine that runs them here."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from knowstore._loaded import LoadedModels
from knowstore.bank import ExpertBank, StoredExpert
from knowstore.config import Codec
from knowstore.passages import PassageRow
from knowstore.records import Passage
from knowstore.sources import sentence_spans

if TYPE_CHECKING:
    from knowstore.retrieval import Retriever

CHUNK = 512
"""Passages in one write: experts of a few dozen MB."""

_BATCH_TOKENS = 4096  # padded tokens in one forward of the LLM

Batches = Iterable[Sequence[Passage]]


class Engine(Protocol):
    """What runs the models over passages: in this process, or on many machines.

    Every engine computes the same batches, and a batch gives the same numbers wherever it is computed.
    """

    model_seconds: float
    """How long models took, summed over processes."""

    def fill(
        self, batches: Batches, bank: ExpertBank, codec: Codec, batch_id: int, on_done: Callable[[int], None]
    ) -> Generator[list[PassageRow]]:
        """Embed passages and write their experts to the bank, some hundred at a time.

        Args:
            batches: what `token_batches` gives.
            bank, codec, batch_id: where experts go, how they are kept, and the edit batch that they belong to.
            on_done: told of how many passages more the models have read.

        Yields: rows of passages whose experts are in the bank.
        """
        ...

    def remake(
        self, batches: Batches, bank: ExpertBank, codec: Codec, batch_id: int, on_done: Callable[[int], None]
    ) -> None:
        """Write the experts of passages that are stored already to the bank, some hundred at a time; arguments as for
        `fill`."""
        ...


class InProcess:
    """The engine that needs no other: one batch after another, with the models of the store."""

    def __init__(self, models: LoadedModels) -> None:
        self._models = models
        self.model_seconds = 0.0

    def fill(
        self, batches: Batches, bank: ExpertBank, codec: Codec, batch_id: int, on_done: Callable[[int], None]
    ) -> Generator[list[PassageRow]]:
        """See `Engine`."""
        rows: list[PassageRow] = []
        experts: list[StoredExpert] = []
        for batch in batches:
            started = time.perf_counter()
            rows += embedded_rows(self._models.retriever, batch)
            experts += generated(batch, [row.segments for row in rows[-len(batch) :]], self._models, codec)
            self.model_seconds += time.perf_counter() - started
            on_done(len(batch))
            if len(rows) >= CHUNK:
                bank.add(experts, codec, batch_id)
                yield rows
                rows, experts = [], []
        if rows:
            bank.add(experts, codec, batch_id)
            yield rows

    def remake(
        self, batches: Batches, bank: ExpertBank, codec: Codec, batch_id: int, on_done: Callable[[int], None]
    ) -> None:
        """See `Engine`."""
        experts: list[StoredExpert] = []
        for batch in batches:
            started = time.perf_counter()
            experts += generated(batch, [sentence_spans(passage.text) for passage in batch], self._models, codec)
            self.model_seconds += time.perf_counter() - started
            on_done(len(batch))
            if len(experts) >= CHUNK:
                bank.add(experts, codec, batch_id)
                experts = []
        bank.add(experts, codec, batch_id)


def token_batches(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    """Batches of similar length, so that little is padded, each for one forward, from every 512 passages."""
    remaining = iter(passages)
    while chunk := list(islice(remaining, CHUNK)):
        order = sorted(range(len(chunk)), key=lambda index: len(chunk[index].text))
        while order:
            longest = len(chunk[order[-1]].text) // 4 + 16  # tokens, roughly
            n = max(1, min(len(order), _BATCH_TOKENS // longest))
            batch, order = order[-n:], order[:-n]
            yield [chunk[index] for index in batch]


def embedded_rows(retriever: Retriever, passages: Sequence[Passage]) -> list[PassageRow]:
    """Passages with their sentences and the vectors of both, as rows to be added."""
    spans = [sentence_spans(passage.text) for passage in passages]
    vectors = retriever.encode_passages(passages, spans)
    return [
        PassageRow(passage, vector, span, segment_vectors)
        for passage, span, (vector, segment_vectors) in zip(passages, spans, vectors, strict=True)
    ]


def generated(
    passages: Sequence[Passage], spans: Sequence[Sequence[tuple[int, int]]], models: LoadedModels, codec: Codec
) -> list[StoredExpert]:
    """Experts of the passages of one batch, from the characters of their sentences."""
    from knowstore.experts import PassageInput

    inputs = [PassageInput(p.title, p.text, tuple(span)) for p, span in zip(passages, spans, strict=True)]
    return models.generate([passage.passage_id for passage in passages], inputs, latent=codec == "latent")
