"""All audits of a store, gathered for a report: figures by mode, curves, batches, and single questions then and now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, cast, get_args

from knowstore.audits.results import Figures, measure, summarise
from knowstore.audits.roles import FACTS, roles_at
from knowstore.models import ROLES, UnresolvedModel, listing
from knowstore.records import Asked, Audit, Mode, Probe, ProbeAnswer
from knowstore.store import KnowledgeStore

Row = dict[str, Any]


@dataclass
class _Seen:
    """The first and the latest answer of each probe with the batches after which they were given, and all answers of
    the last two stretches of audits, each of one batch and one way of answering."""

    first: dict[int, tuple[int, ProbeAnswer]] = field(default_factory=dict)
    latest: dict[int, tuple[int, ProbeAnswer]] = field(default_factory=dict)
    before: dict[int, ProbeAnswer] = field(default_factory=dict)
    now: dict[int, ProbeAnswer] = field(default_factory=dict)
    last: Audit | None = None

    def add(self, audit: Audit, answers: Sequence[ProbeAnswer]) -> None:
        if self.last is None or audit.batch_id != self.last.batch_id or _answers_otherwise(self.last, audit):
            self.before, self.now = self.now, {}
        self.last = audit
        for answer in answers:
            self.first.setdefault(answer.probe_id, (audit.batch_id, answer))
            self.now[answer.probe_id] = answer
            self.latest[answer.probe_id] = audit.batch_id, answer


def _answers_otherwise(old: Audit, new: Audit) -> bool:
    """Whether models or settings differ, as far as both audits noted them."""
    return any(
        old.options[name] != new.options[name]
        for name in ("models", "settings", "precision")
        if name in old.options and name in new.options
    )


def gather(store: KnowledgeStore) -> Row:
    """What all finished audits found, ready for JSON.

    Returns: `store`, `created_at`, `batches`, and for each mode that was audited in `modes` what `summarise` gives
        with `trend`, `changed`, `questions`, each with its latest answer, and `answered_otherwise`: the batches whose
        audit had other models or settings than the one before, to which differences there may be due.
    """
    log = store.catalog.audits
    probes = {probe.id: probe for probe in log.probes()}
    titles = {one.passage_id: one.passage.title or one.passage.text[:60] for one in store.passages()}
    modes = []
    for mode in get_args(Mode):
        audits = [audit for audit in log.audits() if audit.mode == mode]
        if audits:
            modes.append(_mode(store, cast(Mode, mode), audits, probes, titles))
    return {
        "store": store.layout.location,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": _model_names(store),
        "batches": _batches(store, probes),
        "modes": modes,
    }  # fmt: skip


def _model_names(store: KnowledgeStore) -> dict[str, str]:
    """By role the name of the model that the store is opened with, its reference where that stands for nothing here."""
    references = {role: str(getattr(store.models.config, role)) for role in ROLES}
    found = listing(references, cache_dir=store.models.cache_dir)
    return {one.role: one.reference if isinstance(one, UnresolvedModel) else one.name for one in found}


def _mode(
    store: KnowledgeStore,
    mode: Mode,
    audits: Sequence[Audit],
    probes: Mapping[int, Probe],
    titles: Mapping[str, str],
) -> Row:
    log = store.catalog.audits
    seen, trend = _Seen(), []
    for audit in audits:
        answers = log.answers(audit.id)
        seen.add(audit, answers)
        trend.append(_point(audit, len(answers), measure(answers, probes)))
    roles = roles_at(store, list(probes.values()), audits[-1].batch_id)
    questions = [_question(probes[probe_id], seen, roles[probe_id], probes, titles) for probe_id in sorted(seen.latest)]
    return {
        **summarise(store, mode),
        "trend": trend,
        "changed": _changed(seen, probes),
        "answered_otherwise": [new.batch_id for old, new in pairwise(audits) if _answers_otherwise(old, new)],
        "questions": questions,
    }


def _point(audit: Audit, n: int, figures: Figures) -> Row:
    """One audit on the curves."""
    kinds, locality, contested, residue = (
        cast(Row, figures[name]) for name in ("kinds", "locality", "contradictions", "residue")
    )
    facts = [kinds[kind] for kind in FACTS if kind in kinds]
    n_facts = sum(one["n"] for one in facts)
    return {
        "audit_id": audit.id,
        "batch_id": audit.batch_id,
        "created_at": audit.created_at.isoformat(timespec="seconds"),
        "seconds": audit.seconds,
        "options": audit.options,
        "n": n,
        "em": sum(one["n"] * one["em"] for one in facts) / n_facts if n_facts else None,
        "f1": sum(one["n"] * one["f1"] for one in facts) / n_facts if n_facts else None,
        "locality": locality["same"],
        "newer": contested["both_retrieved"]["rate"],
        "leaked": residue["rate"],
    }


def _changed(seen: _Seen, probes: Mapping[int, Probe]) -> Row:
    """What is answered otherwise than in the audit before, of the facts that were current both times."""
    both = [
        (seen.before[probe_id], answer)
        for probe_id, answer in seen.now.items()
        if probe_id in seen.before and answer.state == seen.before[probe_id].state == "current"
        and probes[probe_id].kind in FACTS and None not in (answer.text, seen.before[probe_id].text)
    ]  # fmt: skip
    rows = [
        {
            "probe_id": now.probe_id,
            "batch_id": probes[now.probe_id].batch_id,
            "question": probes[now.probe_id].question,
            "answers": list(probes[now.probe_id].answers),
            "before": before.text,
            "now": now.text,
            "change": "gained" if now.em > before.em else "lost" if now.em < before.em else "other words",
        }
        for before, now in both
        if now.text != before.text
    ]
    counts = {name: sum(row["change"] == name for row in rows) for name in ("gained", "lost", "other words")}
    return {"n": len(both), "unchanged": len(both) - len(rows), **counts, "rows": rows}


def _question(probe: Probe, seen: _Seen, role: Asked, probes: Mapping[int, Probe], titles: Mapping[str, str]) -> Row:
    """A question with what became of it up to the batch that was audited last, in whichever audit it was asked."""
    (now_after, now), (first_after, then) = seen.latest[probe.id], seen.first[probe.id]
    rival = probes.get(role.contested_by or 0)
    return {
        "batch_id": probe.batch_id,
        "probe_id": probe.id,
        "kind": probe.kind,
        "state": role.state,
        "now_state": now.state,
        "question": probe.question,
        "answers": list(probe.answers),
        "newer_answers": list(rival.answers) if rival else [],
        "then_after": first_after,
        "then": then.text,
        "then_em": then.em,
        "then_f1": then.f1,
        "now_after": now_after,
        "now": now.text,
        "now_em": now.em,
        "now_f1": now.f1,
        "untouched": now.untouched,
        "rank": now.rank,
        "experts": [
            {"passage_id": passage_id, "weight": weight, "batch_id": batch, "title": titles.get(passage_id, passage_id)}
            for passage_id, weight, batch in now.experts
        ],
    }


def _batches(store: KnowledgeStore, probes: Mapping[int, Probe]) -> list[Row]:
    return [
        {
            "id": batch.id,
            "kind": batch.kind,
            "committed_at": None if batch.committed_at is None else batch.committed_at.isoformat(timespec="seconds"),
            "note": batch.note,
            "n_added": batch.n_added,
            "n_removed": batch.n_removed,
            "n_probes": sum(probe.batch_id == batch.id for probe in probes.values()),
        }
        for batch in reversed(store.batches())
        if batch.state == "live"
    ]
