"""Probes files, and keeping probes with the edit batches whose facts they ask for."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from knowstore.audits.roles import emptied, roles_at
from knowstore.errors import CatalogError, SourceError
from knowstore.records import Probe, ProbeKind, SourceFailure
from knowstore.store import KnowledgeStore

_MAX_BYTES, _MAX_LINE_BYTES = 1 << 29, 1 << 24  # uncompressed
_MAX_FAILURES = 10_000


@dataclass(frozen=True)
class ProbesFile:
    """What reading a probes file gave: probes with the places they stand at, and the rows that are none."""

    rows: tuple[tuple[str, Probe], ...]
    failures: tuple[SourceFailure, ...]


@dataclass(frozen=True)
class ProbesReport:
    """How many probes were added, how many were there already, and which could not be kept, each with the reason."""

    added: int
    known: int
    failures: tuple[SourceFailure, ...]


def read_probes(path: Path) -> ProbesFile:
    """Read rows `{question, answers, kind, passage_id?}` of a JSON Lines file, gzip-compressed or not.

    A row that is no probe is reported as `file:line`, and reading goes on.

    Raises:
        SourceError: the file cannot be read, is larger than 512 MiB uncompressed or has a line of more than 16 MiB, or
            10,000 of its rows are no probes.
    """
    rows: list[tuple[str, Probe]] = []
    failures: list[SourceFailure] = []
    for number, line in _lines(path):
        place, found = f"{path}:{number}", _probe(line)
        if isinstance(found, Probe):
            rows.append((place, found))
        else:
            failures.append(SourceFailure(place, found))
        if len(failures) >= _MAX_FAILURES:
            raise _unreadable(path, f"given up after {len(failures):,} rows that are no probes, the last: {found}")
    return ProbesFile(tuple(rows), tuple(failures))


def write_probes(path: Path, probes: Sequence[Probe]) -> None:
    """Write probes as the rows that `read_probes` reads."""
    path.write_text(probes_text(probes), "utf-8")


def probes_text(probes: Sequence[Probe]) -> str:
    """Probes as the text of a probes file."""
    return "".join(json.dumps(probe_row(probe)) + "\n" for probe in probes)


def probe_row(probe: Probe) -> dict[str, Any]:
    """A probe as a row of a probes file."""
    return {
        "question": probe.question,
        "answers": list(probe.answers),
        "kind": probe.kind,
        "passage_id": probe.passage_id,
    }


def live_probes(store: KnowledgeStore) -> list[Probe]:
    """The probes that can be asked wherever the live passages are: those of removed facts are left out, and those that
    a newer one contests, which in one batch with it would look as true."""
    probes = store.catalog.audits.probes()
    found = roles_at(store, probes, store.catalog.head())
    return [probe for probe in probes if found[probe.id].state == "current" or probe.kind == "removed"]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            number = n_bytes = 0
            while line := stream.readline(_MAX_LINE_BYTES + 1):
                number, n_bytes = number + 1, n_bytes + len(line)
                if len(line) > _MAX_LINE_BYTES or n_bytes > _MAX_BYTES:
                    limit = _MAX_LINE_BYTES if len(line) > _MAX_LINE_BYTES else _MAX_BYTES
                    raise _unreadable(path, f"more than {limit:,} bytes up to line {number:,}")
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: Path, reason: str) -> SourceError:
    return SourceError(
        f"{path} cannot be read: {reason}", kept="the store is as it was", fix="give a .jsonl or .jsonl.gz file"
    )


def _probe(line: bytes) -> Probe | str:
    """The probe of a line, or what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # half characters included
        return f"the row is no JSON in UTF-8: {error}"
    if not isinstance(row, dict):
        return "the row is no object"
    question, answers, kind, passage_id = (row.get(name) for name in ("question", "answers", "kind", "passage_id"))
    if not isinstance(question, str) or not question.strip():
        return "the row has no question"
    if kind not in get_args(ProbeKind):
        return f"the row's kind is {kind!r}, not one of {', '.join(get_args(ProbeKind))}"
    if not isinstance(answers, list) or not all(isinstance(one, str) and one.strip() for one in answers):
        return "the row's answers are no list of texts"
    if not answers and kind != "locality":
        return "the row has no answers"
    if not (passage_id is None or isinstance(passage_id, str)):
        return "the row's passage_id is no text"
    if "\0" in line.decode("utf-8-sig") + question + "".join(answers):
        return "the row holds a NUL character"
    return Probe(question, tuple(answers), cast(ProbeKind, kind), passage_id)


def add_probes(
    store: KnowledgeStore, rows: Sequence[tuple[str, Probe]], *, batch_id: int | None = None
) -> ProbesReport:
    """Keep probes for the audits to come.

    A probe belongs to the batch since which its passage is live; without a live passage to `batch_id`, or to the
    latest batch if None. One that names no passage and is there already is kept again when nothing is left of what
    its batch brought, as when a source that changed is ingested again with the same probes.

    Args:
        rows: probes with the places they stand at, as `read_probes` gives them.

    Raises:
        CatalogError: the store holds nothing yet.
    """
    catalog = store.catalog
    latest = batch_id or catalog.head()
    if not latest:
        raise CatalogError(
            "the store holds nothing that could be asked for", kept="the store is as it was",
            fix="ingest something first: `knowstore ingest PATH --probes FILE`",
        )  # fmt: skip
    wanted = {probe.passage_id for _, probe in rows if probe.passage_id is not None}
    stretches = {passage_id: (first, last) for passage_id, first, last in catalog.intervals(wanted)}
    purged = catalog.purged(wanted)
    kept, failures = [], []
    for place, probe in rows:
        if probe.passage_id is not None and (probe.passage_id not in stretches or probe.passage_id in purged):
            reason = "was purged from it" if probe.passage_id in purged else "was never in it"
            failures.append(SourceFailure(place, f"passage {probe.passage_id!r} is not in the store: it {reason}"))
            continue
        first, last = stretches.get(probe.passage_id or "", (latest, latest))
        kept.append(replace(probe, batch_id=first if last is None else latest))
    known = [probe for probe in catalog.audits.probes() if probe.passage_id is None]
    n_added = catalog.audits.add_probes(kept, renewed=emptied(store, known, catalog.head()))
    return ProbesReport(n_added, len(kept) - n_added, tuple(failures))
