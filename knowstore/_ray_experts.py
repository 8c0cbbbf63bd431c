"""The engine that makes experts on the workers of a Ray cluster.

A worker writes the experts of a share of passages as files beside the bank and returns their descriptions, with the
rows of passages that are new, which are small; this process commits both. Files that a dead worker left are in no
version of the bank and go away in the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from knowstore import _encoding
from knowstore._encoding import Batches, embedded_rows, generated
from knowstore._loaded import LoadedModels
from knowstore._ray import Job, Worker, cluster, imported
from knowstore.bank import EncodedExpert, ExpertBank, write_fragment
from knowstore.config import Codec, RayConfig
from knowstore.passages import PassageRow
from knowstore.records import Passage
from knowstore.sources import sentence_spans

_SHARE = 128  # passages that a worker is given at once, some seconds of work; a lost worker costs two of them

Share = list[Sequence[Passage]]


@dataclass(frozen=True)
class _Place:
    """Where experts go, and what is written with each."""

    uri: str
    bank: str
    codec: Codec
    fingerprint: str
    batch_id: int


@dataclass(frozen=True)
class _Made:
    """A share done: the ids of its passages, their rows where those are to be written, and fragments of the bank to be
    committed."""

    ids: list[str]
    rows: list[PassageRow]
    fragments: list[str]
    seconds: float


class _Worker(Worker):
    def __init__(self, job: Job, place: _Place) -> None:
        super().__init__(job)
        self._place = place

    def make(self, share: Share) -> _Made:
        """Embed the passages of a share and write their experts beside the bank."""
        started = time.perf_counter()
        rows: list[PassageRow] = []
        experts: list[EncodedExpert] = []
        for batch in share:
            made = embedded_rows(self.models.retriever, batch)
            experts += self._experts(batch, [row.segments for row in made])
            rows += made
        return self._written(experts, rows, started)

    def remake(self, share: Share) -> _Made:
        """Write experts of passages that are stored already beside the bank."""
        started = time.perf_counter()
        experts = [
            expert
            for batch in share
            for expert in self._experts(batch, [sentence_spans(passage.text) for passage in batch])
        ]
        return self._written(experts, [], started)

    def _experts(self, batch: Sequence[Passage], spans: Sequence[Sequence[tuple[int, int]]]) -> Iterator[EncodedExpert]:
        place = self._place
        for expert in generated(batch, spans, self.models, place.codec):
            yield EncodedExpert.make(expert, place.codec, place.fingerprint, place.batch_id)

    def _written(self, experts: Sequence[EncodedExpert], rows: list[PassageRow], started: float) -> _Made:
        seconds = time.perf_counter() - started
        fragments = write_fragment(self._place.uri, self._place.bank, experts)
        return _Made([expert.passage_id for expert in experts], rows, fragments, seconds)


class RayEngine:
    """See `Engine`; its workers live as long as one `fill` or `remake`."""

    def __init__(self, config: RayConfig, models: LoadedModels) -> None:
        """
        Raises:
            ConfigError: Ray is not installed.
        """
        imported()
        self._config, self._models = config, models
        self.model_seconds = 0.0

    def fill(
        self, batches: Batches, bank: ExpertBank, codec: Codec, batch_id: int, on_done: Callable[[int], None]
    ) -> Generator[list[PassageRow]]:
        """See `Engine`.

        Raises:
            EngineError: no cluster, or a share whose workers died again and again.
            ConfigError: a worker has other models than this process.
        """
        job = self._job("ingest", "llm", "retriever", "hypernetwork")
        yield from self._committed("make", job, batches, bank, codec, batch_id, on_done)

    def remake(
        self, batches: Batches, bank: ExpertBank, codec: Codec, batch_id: int, on_done: Callable[[int], None]
    ) -> None:
        """See `Engine`; errors are those of `fill`."""
        job = self._job("reexpert", "llm", "hypernetwork")
        for _ in self._committed("remake", job, batches, bank, codec, batch_id, on_done):
            pass

    def _job(self, command: str, *roles: str) -> Job:
        return Job.of(
            self._models, roles, f"the store is as it was; what workers finished is taken up by the next {command}"
        )

    def _committed(
        self,
        method: str,
        job: Job,
        batches: Batches,
        bank: ExpertBank,
        codec: Codec,
        batch_id: int,
        on_done: Callable[[int], None],
    ) -> Generator[list[PassageRow]]:
        """The rows of some hundred passages at a time, whose experts have been made a part of the bank."""
        place = _Place(bank.uri, bank.name, codec, self._models.fingerprints["experts"], batch_id)
        with cluster(self._config, job) as found:
            shares = _shares(batches)
            first = list(islice(shares, found.n_workers))  # no more workers than there is work for
            workers = found.start(len(first), _Worker, place)
            ids: list[str] = []
            rows: list[PassageRow] = []
            fragments: list[str] = []
            for made in workers.done(method, ((share,) for share in chain(first, shares))):
                ids += made.ids
                rows += made.rows
                fragments += made.fragments
                self.model_seconds += made.seconds
                on_done(len(made.ids))
                if len(ids) >= _encoding.CHUNK:
                    bank.commit_fragments(fragments, ids)
                    yield rows
                    ids, rows, fragments = [], [], []
            if ids:
                bank.commit_fragments(fragments, ids)
                yield rows
        bank.sweep()


def _shares(batches: Iterable[Sequence[Passage]]) -> Iterator[Share]:
    """Batches in groups of some more than `_SHARE` passages."""
    share: Share = []
    for batch in batches:
        share.append(batch)
        if sum(map(len, share)) >= _SHARE:
            yield share
            share = []
    if share:
        yield share
