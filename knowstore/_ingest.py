"""Ingest: what is new in some sources, and writing it as one edit batch."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, cast

from knowstore._loaded import LoadedModels, OnProgress
from knowstore.bank import ExpertBank, StoredExpert
from knowstore.config import Codec, SplitConfig
from knowstore.errors import SourceError
from knowstore.passages import PassageRow, PassageTable
from knowstore.records import Passage, SourceFailure
from knowstore.sources import ColumnMap, Source, find_sources, read_passages, sentence_spans

if TYPE_CHECKING:
    from knowstore.retrieval import Retriever

_CHUNK = 512  # passages in one write: experts of a few dozen MB
_BATCH_TOKENS = 4096  # padded tokens in one forward of the LLM


@dataclass
class Scan:
    """What reading all sources once found: passages by source, and what could not be read."""

    placements: dict[str, set[str]] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    failures: list[SourceFailure] = field(default_factory=list)

    @property
    def passage_ids(self) -> set[str]:
        return set().union(*self.placements.values())


class Sources:
    """The inputs of one ingest; they are read twice, first to see what is new. Standard input is kept in a file."""

    def __init__(
        self,
        paths: Sequence[str],
        split: SplitConfig,
        columns: ColumnMap | None,
        stdin: BinaryIO | None,
        stack: ExitStack,
    ) -> None:
        self.sources, self.failures = find_sources(paths)
        self._split, self._columns = split, columns
        self._stdin: BinaryIO | None = None
        if stdin is not None and any(source.path is None for source in self.sources):
            self._stdin = cast(BinaryIO, stack.enter_context(tempfile.TemporaryFile()))  # noqa: SIM115 - the stack closes it
            shutil.copyfileobj(stdin, self._stdin)

    def read(self, source: Source, on_failure: Callable[[SourceFailure], None]) -> Iterator[Passage]:
        """The passages of one source; raises SourceError when it cannot be read (on)."""
        if self._stdin is not None:
            self._stdin.seek(0)
        return read_passages(source, split=self._split, columns=self._columns, on_failure=on_failure, stdin=self._stdin)

    def scan(self, on_progress: OnProgress | None, *, strict: bool) -> Scan:
        """Read everything once.

        Raises:
            SourceError: the first failure, when `strict`.
        """
        scan = Scan()

        def failed(failure: SourceFailure) -> None:
            if strict:
                raise SourceError(
                    f"{failure.source}: {failure.error}",
                    kept="the store is as it was",
                    fix="mend or leave out this input, or run without --strict",
                )
            scan.failures.append(failure)

        for failure in self.failures:
            failed(failure)
        n_passages = 0
        for source in self.sources:
            ids = scan.placements.setdefault(source.name, set())
            try:
                for passage in self.read(source, failed):
                    ids.add(passage.passage_id)
                    n_passages += 1
                    if on_progress is not None and n_passages % 500 == 0:
                        on_progress("reading", n_passages, None)
            except SourceError as error:
                if strict:
                    raise
                scan.unread.add(source.name)
                scan.failures.append(SourceFailure(source.name, error.what))
        if on_progress is not None:
            on_progress("reading", n_passages, n_passages)
        return scan

    def again(self, wanted: set[str]) -> Iterator[Passage]:
        """The passages `wanted` by id, each once, as the second reading gives them."""
        missing = set(wanted)
        for source in self.sources:
            try:
                for passage in self.read(source, lambda _failure: None):
                    if passage.passage_id in missing:
                        missing.discard(passage.passage_id)
                        yield passage
            except SourceError:
                continue  # reported by `scan`; what came before the failure counts


@dataclass
class Written:
    """What `write_passages` wrote, and how long models took for it."""

    ids: set[str] = field(default_factory=set)
    model_seconds: float = 0.0


def write_passages(
    passages: Iterable[Passage],
    n_passages: int,
    table: PassageTable,
    bank: ExpertBank,
    models: LoadedModels,
    codec: Codec,
    batch_id: int,
    on_progress: OnProgress | None,
) -> Written:
    """Embed passages, generate their experts and write both as rows of a staged edit batch."""
    written = Written()
    chunk: list[Passage] = []

    def flush() -> None:
        started = time.perf_counter()
        rows = embedded_rows(models.retriever, chunk)
        experts = _generate(
            chunk, [row.segments for row in rows], models, codec, len(written.ids), n_passages, on_progress
        )
        written.model_seconds += time.perf_counter() - started
        # the bank first: a passage that is there has its expert, whatever happens between the two
        bank.add(experts, codec, batch_id)
        table.add(rows, batch_id)
        written.ids.update(passage.passage_id for passage in chunk)
        chunk.clear()

    for passage in passages:
        chunk.append(passage)
        if len(chunk) >= _CHUNK:
            flush()
    if chunk:
        flush()
    return written


def embedded_rows(retriever: Retriever, passages: Sequence[Passage]) -> list[PassageRow]:
    """Passages with their sentences and the vectors of both, as rows to be added."""
    spans = [sentence_spans(passage.text) for passage in passages]
    vectors = retriever.encode_passages(passages, spans)
    return [
        PassageRow(passage, vector, span, segment_vectors)
        for passage, span, (vector, segment_vectors) in zip(passages, spans, vectors, strict=True)
    ]


def write_experts(
    passages: Sequence[Passage],
    bank: ExpertBank,
    models: LoadedModels,
    codec: Codec,
    batch_id: int,
    on_progress: OnProgress | None,
) -> None:
    """Generate experts of passages that are stored already, and write them alone."""
    spans = [sentence_spans(passage.text) for passage in passages]
    bank.add(_generate(passages, spans, models, codec, 0, len(passages), on_progress), codec, batch_id)


def _generate(
    passages: Sequence[Passage],
    spans: Sequence[Sequence[tuple[int, int]]],
    models: LoadedModels,
    codec: Codec,
    n_before: int,
    n_passages: int,
    on_progress: OnProgress | None,
) -> list[StoredExpert]:
    """Experts in batches of similar length, so that little is padded; in the order of `passages`."""
    from knowstore.experts import PassageInput

    inputs = [PassageInput(p.title, p.text, tuple(span)) for p, span in zip(passages, spans, strict=True)]
    order = sorted(range(len(inputs)), key=lambda index: len(inputs[index].text))
    experts: dict[int, StoredExpert] = {}
    while order:
        longest = len(inputs[order[-1]].text) // 4 + 16  # tokens, roughly
        n = max(1, min(len(order), _BATCH_TOKENS // longest))
        part, order = order[-n:], order[:-n]
        made = models.generate(
            [passages[i].passage_id for i in part], [inputs[i] for i in part], latent=codec == "latent"
        )
        experts.update(zip(part, made, strict=True))
        if on_progress is not None:
            on_progress("embedding and generating experts", n_before + len(experts), n_passages)
    return [experts[index] for index in range(len(passages))]
