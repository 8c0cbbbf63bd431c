"""An audit: every probe asked again under live retrieval over the whole bank, each answer kept as it comes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from knowstore._loaded import OnProgress
from knowstore.audits.results import summarise
from knowstore.audits.roles import Selection, roles
from knowstore.errors import CatalogError, ConfigError
from knowstore.evaluation import exact_match, holds_answer, token_f1
from knowstore.prompts import question_prompt
from knowstore.records import Answer, Asked, Audit, Mode, Probe, ProbeAnswer
from knowstore.store import KnowledgeStore

_BATCH = 16


def run_audit(
    store: KnowledgeStore,
    *,
    mode: Mode = "experts",
    selection: Selection | None = None,
    resume: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, object]:
    """Ask probes of every batch again, keep every answer, and say what was forgotten (DESIGN §7).

    The store is looked at as it is when the audit begins, whatever is written meanwhile. Killed, it goes on where it
    was with `resume`.

    Args:
        mode: as for `KnowledgeStore.ask`.
        selection: which probes; all when None.
        resume: go on with the audit that was cut short last, in its mode and with its probes.

    Returns: what `summary` gives for the mode, with `audit_id`, `batch_id`, `n`, `seconds` of this audit.

    Raises:
        ConfigError: no probes to ask, or no audit to resume.
        CatalogError: the store was changed since the audit to resume began.
    """
    log = store.catalog.audits
    probes = {probe.id: probe for probe in log.probes()}
    audit = _interrupted(store) if resume else _begin(store, list(probes.values()), mode, selection or Selection())
    waiting = log.unanswered(audit.id)
    _cache_untouched(store, [probes[one.probe_id] for one in waiting if _needs_untouched(probes, one)], on_progress)
    for first in range(0, len(waiting), _BATCH):
        part = waiting[first : first + _BATCH]
        started = time.perf_counter()
        answers = store.ask_many(
            [probes[one.probe_id].question for one in part], mode=audit.mode, batch_size=_BATCH, at=audit.batch_id
        )
        kept = [_scored(answer, one, probes) for answer, one in zip(answers, part, strict=True)]
        log.record(audit.id, kept, time.perf_counter() - started)
        if on_progress is not None:
            on_progress("asking", first + len(part), len(waiting))
    audit = log.finish(audit.id)
    n = len(log.answers(audit.id))
    own = {"audit_id": audit.id, "batch_id": audit.batch_id, "n": n, "seconds": audit.seconds}
    return own | summary(store, audit.mode)


def summary(store: KnowledgeStore, mode: Mode) -> dict[str, object]:
    """What all finished audits of a mode found, see `summarise`; asks nothing."""
    return summarise(store.catalog.audits, mode, untouched_of(store))


def _begin(store: KnowledgeStore, probes: Sequence[Probe], mode: Mode, selection: Selection) -> Audit:
    if mode != "rag":
        store.models.check_trained()
    chosen = selection.choose(probes)
    if not chosen:
        raise ConfigError(
            "there are no probes to ask" if not probes else "no probe belongs to the batches that were named",
            kept="nothing was asked",
            fix="give probes with `knowstore ingest PATH --probes FILE`, or let `knowstore probes make` make some",
        )
    at = store.catalog.head()
    states = roles(probes, _live(store, probes, at), _emptied(store, probes, at))
    return store.catalog.audits.begin(at, mode, asdict(selection), [states[probe.id] for probe in chosen])


def _interrupted(store: KnowledgeStore) -> Audit:
    audits = store.catalog.audits.audits(finished=False)
    if not audits:
        raise ConfigError(
            "no audit was cut short", kept="nothing was asked", fix="run `knowstore audit` without --resume"
        )
    if audits[-1].batch_id != store.catalog.head():
        raise CatalogError(
            f"audit {audits[-1].id} began after edit batch {audits[-1].batch_id}, and the store was changed since",
            kept="its answers are kept, but count nowhere",
            fix="run `knowstore audit` without --resume",
        )
    return audits[-1]


def _live(store: KnowledgeStore, probes: Iterable[Probe], at: int) -> set[str]:
    wanted = {probe.passage_id for probe in probes if probe.passage_id is not None}
    return {
        passage_id
        for passage_id, first, last in store.catalog.intervals(wanted)
        if first <= at and (last is None or last > at)
    }


def _emptied(store: KnowledgeStore, probes: Iterable[Probe], at: int) -> set[int]:
    """Batches that have probes without a passage and nothing live of what they added."""
    emptied = set()
    live = {passage_id for passage_id, _ in store.catalog.placements_at(at)}
    for batch_id in {probe.batch_id for probe in probes if probe.passage_id is None}:
        added = {passage_id for passage_id, _ in store.catalog.batch_items(batch_id)["added"]}
        if added and not added & live:
            emptied.add(batch_id)
    return emptied


def _scored(answer: Answer, asked: Asked, probes: dict[int, Probe]) -> ProbeAnswer:
    probe = probes[asked.probe_id]
    ranks = {hit.passage_id: place for place, hit in enumerate(answer.hits, 1)}
    rival = None if asked.contested_by is None else probes[asked.contested_by].passage_id
    return ProbeAnswer(
        probe.id,
        answer.text,
        exact_match(answer.text, probe.answers),
        token_f1(answer.text, probe.answers),
        ranks.get(probe.passage_id or ""),
        ranks.get(rival or ""),
        any(holds_answer(f"{one.title} {one.text}", probe.answers) for one in answer.experts),
        tuple((one.passage_id, one.weight, one.batch_id) for one in answer.experts),
    )


# The untouched model, which locality and residue are compared with


def _needs_untouched(probes: dict[int, Probe], asked: Asked) -> bool:
    return asked.state == "gone" or probes[asked.probe_id].kind == "locality"


def untouched_of(store: KnowledgeStore) -> dict[str, str]:
    """What the untouched model answered to the questions of probes, by question, as far as it was asked."""
    questions = {probe.question for probe in store.catalog.audits.probes()}
    keys = {_key(store, question): question for question in questions}
    return {keys[key]: text for key, text in store.catalog.audits.untouched(list(keys)).items()}


def _key(store: KnowledgeStore, question: str) -> str:
    how = (store.models.fingerprints["llm"], store.models.config.dtype, repr(store.generation), question)
    return hashlib.sha256("\0".join(how).encode()).hexdigest()[:32]


def _cache_untouched(store: KnowledgeStore, probes: Sequence[Probe], on_progress: OnProgress | None) -> None:
    """Ask the bare model what it was not asked before."""
    from knowstore.experts import Prompt, generate

    log = store.catalog.audits
    keys = {_key(store, probe.question): probe.question for probe in probes}
    known = log.untouched(list(keys))
    missing = [key for key in keys if key not in known]
    for first in range(0, len(missing), _BATCH):
        part = missing[first : first + _BATCH]
        prompts = [Prompt("", question_prompt(keys[key])) for key in part]
        answers = generate(store.models.llm, prompts, None, 0, store.generation)
        log.add_untouched([(key, keys[key], one.text) for key, one in zip(part, answers, strict=True)])
        if on_progress is not None:
            on_progress("asking the untouched model", first + len(part), len(missing))
