"""What each probe is to an audit, and which probes it asks."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from knowstore.errors import ConfigError
from knowstore.evaluation import normalise
from knowstore.records import Asked, Probe, ProbeState
from knowstore.store import KnowledgeStore

FACTS = ("reliability", "paraphrase", "portability")


@dataclass(frozen=True)
class Selection:
    """Which probes an audit asks: those of `batches`, or of batches from `since` on; `sample` of each batch and kind,
    the same ones every time for one `seed`."""

    since: int | None = None
    batches: tuple[int, ...] | None = None
    sample: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sample is not None and self.sample < 1:
            raise ConfigError(f"sample is {self.sample}", kept="nothing was asked", fix="use at least 1")

    def choose(self, probes: Iterable[Probe]) -> list[Probe]:
        """The chosen ones of `probes`, in their order."""
        chosen = [
            probe
            for probe in probes
            if (self.batches is None or probe.batch_id in self.batches)
            and (self.since is None or probe.batch_id >= self.since)
        ]
        if self.sample is None:
            return chosen
        groups: dict[tuple[int, str], list[Probe]] = defaultdict(list)
        for probe in sorted(chosen, key=lambda one: random.Random(f"{self.seed}/{one.id}").random()):
            groups[probe.batch_id, probe.kind].append(probe)
        kept = {probe.id for group in groups.values() for probe in group[: self.sample]}
        return [probe for probe in chosen if probe.id in kept]


def roles_at(store: KnowledgeStore, probes: Sequence[Probe], at: int) -> Mapping[int, Asked]:
    """What each probe is to an audit of the store as it is after edit batch `at`, by id."""
    return roles(probes, _live(store, probes, at), emptied(store, probes, at))


def _live(store: KnowledgeStore, probes: Iterable[Probe], at: int) -> set[str]:
    wanted = {probe.passage_id for probe in probes if probe.passage_id is not None}
    return {
        passage_id
        for passage_id, first, last in store.catalog.intervals(wanted)
        if first <= at and (last is None or last > at)
    }


def emptied(store: KnowledgeStore, probes: Iterable[Probe], at: int) -> set[int]:
    """Batches that have probes without a passage and, after batch `at`, nothing live of what they added."""
    asked, found = {probe.batch_id for probe in probes if probe.passage_id is None}, set()
    live = {passage_id for passage_id, _ in store.catalog.placements_at(at)} if asked else set()
    for batch_id in asked:
        added = {passage_id for passage_id, _ in store.catalog.batch_items(batch_id)["added"]}
        if added and not added & live:
            found.add(batch_id)
    return found


def roles(probes: Sequence[Probe], live: Collection[str], emptied: Collection[int]) -> dict[int, Asked]:
    """What each probe is, by id.

    Args:
        probes: all probes there are.
        live: ids of live passages. A probe whose own is not among them is gone, unless another probe accepts the same
            answer to the same question and is not: the passage was replaced by one that still says it.
        emptied: batches none of whose passages is live; their probes without a passage of their own are gone too.
    """
    gone = {probe.id for probe in probes if _is_gone(probe, live, emptied)}
    still_told = {fact for probe in probes if probe.kind in FACTS and probe.id not in gone for fact in _told(probe)}
    gone -= {probe.id for probe in probes if probe.kind in FACTS and _told(probe) & still_told}
    facts = [probe for probe in probes if probe.kind in FACTS and probe.id not in gone]
    contested = _contested(facts)
    out = {}
    for probe in probes:
        state: ProbeState = "gone" if probe.id in gone else "contested" if probe.id in contested else "current"
        out[probe.id] = Asked(probe.id, state, contested.get(probe.id))
    return out


def passages_that_tell(probes: Sequence[Probe]) -> dict[int, set[str]]:
    """For each probe the passages that it and other probes name for an answer that it accepts to its question, by id:
    a passage that was replaced by one that says the same is answered by that."""
    named: dict[tuple[str, str], set[str]] = defaultdict(set)
    for probe in probes:
        if probe.passage_id is not None:
            for fact in _told(probe):
                named[fact].add(probe.passage_id)
    return {
        probe.id: set() if probe.passage_id is None else {one for fact in _told(probe) for one in named[fact]}
        | {probe.passage_id}
        for probe in probes
    }  # fmt: skip


def _is_gone(probe: Probe, live: Collection[str], emptied: Collection[int]) -> bool:
    if probe.kind in ("locality", "removed"):
        return probe.kind == "removed"
    return probe.batch_id in emptied if probe.passage_id is None else probe.passage_id not in live


def _contested(facts: Sequence[Probe]) -> dict[int, int]:
    """Probes whose question a newer batch answers otherwise, each with the newest such probe; other probes that look
    for the same answer in the same passage are contested with it."""
    by_question: dict[str, list[Probe]] = defaultdict(list)
    for probe in facts:
        by_question[_asked(probe)].append(probe)
    found: dict[int, int] = {}
    for group in by_question.values():
        newest = max(group, key=lambda probe: (probe.batch_id, probe.id))
        for probe in group:
            if probe.batch_id < newest.batch_id and not _answers(probe) & _answers(newest):
                found[probe.id] = newest.id
    stale: dict[tuple[str | None, str], int] = {
        (probe.passage_id, answer): found[probe.id]
        for probe in facts
        if probe.id in found and probe.passage_id is not None
        for answer in _answers(probe)
    }
    for probe in facts:
        for answer in _answers(probe):
            if (probe.passage_id, answer) in stale:
                found.setdefault(probe.id, stale[probe.passage_id, answer])
    return found


def _told(probe: Probe) -> set[tuple[str, str]]:
    """What a probe takes for true: pairs (question, accepted answer)."""
    return {(_asked(probe), answer) for answer in _answers(probe)}


def _asked(probe: Probe) -> str:
    """The question without what makes no other one of it: capitals, blanks and its end. Signs within do: C and C++."""
    return " ".join(probe.question.casefold().split()).rstrip("?!. ")


def _answers(probe: Probe) -> set[str]:
    """The accepted answers, normalised where something is left of them; of `A` nothing is."""
    return {normalise(answer) or answer.casefold().strip() for answer in probe.answers}
