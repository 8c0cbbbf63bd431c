"""Frozen records that cross the parts of knowstore; standard library only."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Literal

Mode = Literal["experts", "rag", "hybrid"]
BatchKind = Literal["ingest", "add", "remove", "replace", "rollback", "import"]
BatchState = Literal["staged", "live", "discarded"]
ProbeKind = Literal["reliability", "paraphrase", "locality", "portability", "removed"]
ProbeState = Literal["current", "contested", "gone"]

_SURROGATE = re.compile("[\ud800-\udfff]")


def well_formed(text: str) -> str:
    """The text with U+FFFD for every lone surrogate, half a character, which a command line may give and UTF-8 has
    not."""
    return _SURROGATE.sub("\ufffd", text)


@dataclass(frozen=True)
class Passage:
    """One retrievable text.

    Args:
        text: the passage, about 100 words; never empty.
        title: carried along with every passage of a document; may be empty.
        source: where it came from (a path, a URL, a name); a later ingest of the same source
            supersedes the passages that are no longer in it.
        date: of the content, empty when unknown; a store keeps it as `YYYY-MM-DD`.
    """

    text: str
    title: str = ""
    source: str = ""
    date: str = ""

    @cached_property
    def passage_id(self) -> str:
        """Content hash of title and text after unicode NFC and blank folding, 32 hex digits."""
        parts = (" ".join(unicodedata.normalize("NFC", part).split()) for part in (self.title, self.text))
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class SourceFailure:
    """An input that could not be read, and why."""

    source: str
    error: str


@dataclass(frozen=True)
class EditBatch:
    """One unit of change, as the catalog records it.

    `n_added`, `n_removed` count passages that became live or stopped being live; `n_superseded`
    is the part of `n_removed` that a newer version of the same source replaced.
    """

    id: int
    kind: BatchKind
    state: BatchState
    created_at: datetime
    committed_at: datetime | None = None
    note: str = ""
    n_added: int = 0
    n_removed: int = 0
    n_superseded: int = 0


@dataclass(frozen=True)
class IngestReport:
    """What one ingest did; `batch_id` is None when nothing changed."""

    batch_id: int | None
    passages_added: int
    passages_unchanged: int
    passages_superseded: int
    failures: tuple[SourceFailure, ...]
    seconds: float
    seconds_in_models: float = 0.0


@dataclass(frozen=True)
class RemoveReport:
    batch_id: int | None
    removed: int
    purged: bool


@dataclass(frozen=True)
class RollbackReport:
    batch_id: int | None
    restored: int
    removed: int


@dataclass(frozen=True)
class ReexpertReport:
    """What a change of hypernetwork or LLM did: fingerprints of experts after and before, how many experts were
    generated and how many were there already; `fingerprint` is `previous` when nothing changed."""

    fingerprint: str
    previous: str
    generated: int
    reused: int
    seconds: float


@dataclass(frozen=True)
class KeptBank:
    """A bank that is not in use: its name, bytes on disk, and the models that an undo would change back to; those are
    empty when a change that was cut short began it, or one before the last left it."""

    name: str
    size_bytes: int
    hypernetwork: str
    llm: str


@dataclass(frozen=True)
class StoredPassage:
    """A passage with what the catalog and the table know about it."""

    passage: Passage
    passage_id: str
    batch_id: int
    state: Literal["live", "removed"] = "live"


@dataclass(frozen=True)
class Hit:
    """A retrieved passage; `retrieval_score` is the inner product of Eq. 7 (or the fused score of
    hybrid search), `score` the reranker's, `segments` the characters of its sentences and
    `segment_scores` their scores, `word_scores` (first character, last character, score) for each
    word piece, from a reranker that gives them. `newer_twin` is a passage that says nearly the same
    and is from a newer edit batch, for which this one is not used."""

    passage_id: str
    title: str
    text: str
    source: str
    date: str
    batch_id: int
    retrieval_score: float
    score: float = 0.0
    segments: tuple[tuple[int, int], ...] = ()
    segment_scores: tuple[float, ...] = ()
    word_scores: tuple[tuple[int, int, float], ...] = ()
    newer_twin: str | None = None


@dataclass(frozen=True)
class MountedExpert:
    """A passage behind an answer; weights of one answer sum to 1 (Eq. 9). Where its expert is mounted by words, that of
    a passage with less than a thousandth of the best one's weight is not.

    `segment_weights` share the weight among the passage's sentences, whose characters are
    `segments`. `word_weights` are (first character, last character, weight) of its word pieces, the
    likeliest one having the passage's weight; empty when the expert was mounted at a coarser grain or not
    at all.
    """

    passage_id: str
    weight: float
    score: float
    batch_id: int
    source: str
    title: str
    text: str
    segments: tuple[tuple[int, int], ...] = ()
    segment_weights: tuple[float, ...] = ()
    word_weights: tuple[tuple[int, int, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """A generated answer with its provenance; `experts` is empty when the null option won, and the passages of the
    first `n_read` were read in the prompt. `hits` is empty where `ask_many` was to do without details."""

    question: str
    text: str
    mode: Mode
    experts: tuple[MountedExpert, ...]
    hits: tuple[Hit, ...]
    timings_s: dict[str, float] = field(default_factory=dict)
    is_null: bool = False
    notes: tuple[str, ...] = ()
    n_read: int = 0


@dataclass(frozen=True)
class Stats:
    """How many live passages, experts and edit batches a store holds, and the bytes of each of its parts."""

    passages: int
    experts: int
    batches: int
    bytes: dict[str, int]


@dataclass(frozen=True)
class Problem:
    """Something `verify` found: what it is, which rows, and how to mend it."""

    kind: str
    detail: str
    fix: str


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found, and how many things of each kind it looked at."""

    clean: bool
    problems: tuple[Problem, ...]
    checked: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """A question with accepted answers that audits ask again; it came with edit batch `batch_id`.

    `reliability` asks for a fact of the batch, `paraphrase` in other words, `portability` for what follows from it.
    `locality` asks for what no batch is about, `removed` for what must not be known. `passage_id` names the passage
    that holds the fact; once that is live no longer, the probe must not be answered.
    """

    question: str
    answers: tuple[str, ...]
    kind: ProbeKind
    passage_id: str | None = None
    batch_id: int = 0
    id: int = 0


@dataclass(frozen=True)
class Asked:
    """What a probe is to one audit: `current`, `gone` with its passage, or `contested` by a newer probe that accepts
    other answers to the same question."""

    probe_id: int
    state: ProbeState
    contested_by: int | None = None


@dataclass(frozen=True)
class ProbeAnswer:
    """How a probe was answered in an audit.

    `rank` is the place of the probe's own passage among those that were retrieved, from 1, `contested_rank` that of
    the contesting probe's, None when it was not. `is_told` says that a mounted passage holds an accepted answer.
    `experts` are (passage_id, weight, batch_id) of what was mounted. `untouched` is what the untouched model answers to
    a question that no live passage should answer, None for others. `text` is None where a passage that was mounted
    has been purged since.
    """

    probe_id: int
    text: str | None
    em: float
    f1: float
    rank: int | None
    contested_rank: int | None
    is_told: bool
    experts: tuple[tuple[str, float, int], ...]
    untouched: str | None = None
    state: ProbeState = "current"
    contested_by: int | None = None


@dataclass(frozen=True)
class Audit:
    """One audit of the store as it was right after edit batch `batch_id`; `finished_at` is None if it was cut short.

    `seconds` counts what asking took, over all resumes.
    """

    id: int
    batch_id: int
    mode: Mode
    created_at: datetime
    finished_at: datetime | None
    seconds: float
    options: dict[str, object]
