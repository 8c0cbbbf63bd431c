"""Ingest: what is new in some sources, and writing it as one edit batch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from knowstore._encoding import Engine, token_batches
from knowstore._loaded import OnProgress
from knowstore._upkeep import parts
from knowstore.bank import ExpertBank
from knowstore.config import Codec, SplitConfig
from knowstore.errors import SourceError
from knowstore.passages import PassageTable
from knowstore.records import Passage, SourceFailure
from knowstore.sources import ColumnMap, Source, find_sources, read_passages


@dataclass
class Scan:
    """What reading all sources once found: passages by source, and what could not be read; `unread` names the sources
    of which something could not, whose earlier passages stay."""

    placements: dict[str, set[str]] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    failures: list[SourceFailure] = field(default_factory=list)

    @property
    def passage_ids(self) -> set[str]:
        return set().union(*self.placements.values())


class Sources:
    """The inputs of one ingest; they are read twice, first to see what is new. Standard input is kept in a file. The
    folder `without` is not searched."""

    def __init__(
        self,
        paths: Sequence[str],
        split: SplitConfig,
        columns: ColumnMap | None,
        stdin: BinaryIO | None,
        stack: ExitStack,
        without: Path | None = None,
    ) -> None:
        self.sources, self.failures = find_sources(paths, without)
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
            ids, n_failures = scan.placements.setdefault(source.name, set()), len(scan.failures)
            try:
                for passage in self.read(source, failed):
                    ids.add(passage.passage_id)
                    n_passages += 1
                    if on_progress is not None and n_passages % 500 == 0:
                        on_progress("reading", n_passages, None)
            except SourceError as error:
                if strict:
                    raise
                scan.failures.append(SourceFailure(source.name, error.what))
            if len(scan.failures) > n_failures:
                scan.unread.add(source.name)
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


def write_passages(
    passages: Iterable[Passage],
    n_passages: int,
    table: PassageTable,
    bank: ExpertBank,
    engine: Engine,
    codec: Codec,
    batch_id: int,
    on_progress: OnProgress | None,
) -> set[str]:
    """Embed passages, generate their experts and write both as rows of a staged edit batch; returns the ids."""
    written: set[str] = set()
    on_done = counted(on_progress, "embedding and generating experts", n_passages)
    with closing(engine.fill(token_batches(passages), bank, codec, batch_id, on_done)) as filled:
        for rows in filled:  # after the bank: a passage that is there has its expert, whatever happens between the two
            table.add(rows, batch_id)
            written.update(row.passage.passage_id for row in rows)
    return written


def stored_batches(table: PassageTable, ids: Sequence[str]) -> Iterator[list[Passage]]:
    """Batches of passages that are stored already, some hundred of which are in memory."""
    return token_batches(row.passage for part in parts(ids) for row in table.get(part, at=None))


def counted(on_progress: OnProgress | None, stage: str, n_passages: int) -> Callable[[int], None]:
    """Adds up passages that models have read, and says how many of all they are."""
    n_done = 0

    def on_done(n: int) -> None:
        nonlocal n_done
        n_done += n
        if on_progress is not None:
            on_progress(stage, n_done, n_passages)

    return on_done
