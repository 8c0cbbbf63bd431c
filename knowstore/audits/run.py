"""An audit: every probe asked again under live retrieval over the whole bank, each answer kept as it comes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import cast

from knowstore._loaded import OnProgress
from knowstore.audits.results import summarise
from knowstore.audits.roles import Selection, passages_that_tell, roles_at
from knowstore.errors import CatalogError, ConfigError
from knowstore.evaluation import exact_match, holds_answer, token_f1
from knowstore.prompts import question_prompt
from knowstore.records import Answer, Asked, Audit, Mode, Probe, ProbeAnswer
from knowstore.store import KnowledgeStore

_KEPT_AT_ONCE = 16  # answers


def run_audit(
    store: KnowledgeStore,
    *,
    mode: Mode = "experts",
    selection: Selection | None = None,
    resume: bool = False,
    batch_size: int = 1,
    on_progress: OnProgress | None = None,
) -> dict[str, object]:
    """Ask probes of every batch again, keep every answer, and say what was forgotten.

    The store is looked at as it is after the edit batch at which the audit begins; a passage that is removed meanwhile
    and brought back by a rollback is missed. Killed, it goes on where it was with `resume`.

    Args:
        mode: as for `KnowledgeStore.ask`.
        selection: which probes; all when None.
        resume: go on with the audit that was cut short last, in its mode and with its probes.
        batch_size: questions in one generation. More are faster, but what stands beside a question changes the last
            bits of its sums, and now and then a word of its answer; one gives what `ask` gives.

    Returns: what `summarise` gives for the mode, with `audit_id`, `batch_id`, `n`, `seconds` of this audit.

    Raises:
        ConfigError: no probes to ask, or no audit to resume.
        CatalogError: the store, its models or how it retrieves and answers changed since the audit to resume began.
    """
    log = store.catalog.audits
    probes = {probe.id: probe for probe in log.probes()}
    tellers = passages_that_tell(list(probes.values()))
    audit = _interrupted(store) if resume else _begin(store, list(probes.values()), mode, selection or Selection())
    waiting = log.unanswered(audit.id)
    n_kept = max(_KEPT_AT_ONCE, batch_size)
    for first in range(0, len(waiting), n_kept):
        part = waiting[first : first + n_kept]
        started = time.perf_counter()
        answers = store.ask_many(
            [probes[one.probe_id].question for one in part], mode=audit.mode, batch_size=batch_size, at=audit.batch_id
        )
        bare = _untouched(store, part, probes)
        kept = [_scored(answer, one, probes, tellers, bare) for answer, one in zip(answers, part, strict=True)]
        log.record(audit.id, kept, time.perf_counter() - started)
        if on_progress is not None:
            on_progress("asking", first + len(part), len(waiting))
    audit = log.finish(audit.id)
    n = len(log.answers(audit.id))
    own = {"audit_id": audit.id, "batch_id": audit.batch_id, "n": n, "seconds": audit.seconds}
    return own | summarise(store, audit.mode)


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
    states = roles_at(store, probes, at)
    options = asdict(selection) | {"models": _models(store, mode), "settings": _settings(store)}
    options["precision"] = _precision(store)
    return store.catalog.audits.begin(at, mode, options, [states[probe.id] for probe in chosen])


def _models(store: KnowledgeStore, mode: Mode) -> dict[str, str]:
    """Digests of everything that decides answers in a mode."""
    models = store.models
    reader = None if mode == "experts" else models.reader
    of_reader = "" if reader is None else reader.fingerprint()
    return models.fingerprints | {"reranker": models.reranker.fingerprint, "reader": of_reader}


def _settings(store: KnowledgeStore) -> dict[str, object]:
    """How the store retrieves and answers, as JSON gives it back."""
    found = json.loads(json.dumps({"retrieval": asdict(store.retrieval), "generation": asdict(store.generation)}))
    return cast(dict[str, object], found)


def _precision(store: KnowledgeStore) -> str:
    """In what the language model computes, and on which kind of device."""
    llm = store.models.llm
    return f"{str(llm.dtype).removeprefix('torch.')} on {llm.device.type}"


def _interrupted(store: KnowledgeStore) -> Audit:
    audits = store.catalog.audits.audits(finished=False)
    if not audits:
        raise ConfigError(
            "no audit was cut short", kept="nothing was asked", fix="run `knowstore audit` without --resume"
        )
    audit = audits[-1]
    changed = "the store was" if audit.batch_id != store.catalog.head() else ""
    if not changed and audit.options["models"] != _models(store, audit.mode):
        changed = "its models were"
    if not changed and audit.options.get("settings") not in (None, _settings(store)):
        changed = "how it retrieves and answers was"
    if not changed and audit.options.get("precision") not in (None, _precision(store)):
        changed = "the precision or device that it computes with was"
    if changed:
        raise CatalogError(
            f"audit {audit.id} began after edit batch {audit.batch_id}, and {changed} changed since",
            kept="its answers are kept, but count nowhere",
            fix="run `knowstore audit` without --resume",
        )
    return audit


def _scored(
    answer: Answer,
    asked: Asked,
    probes: Mapping[int, Probe],
    tellers: Mapping[int, Collection[str]],
    bare: Mapping[int, str],
) -> ProbeAnswer:
    probe = probes[asked.probe_id]
    ranks = {hit.passage_id: place for place, hit in enumerate(answer.hits, 1)}

    def rank(probe_id: int | None) -> int | None:
        found = [] if probe_id is None else [ranks[one] for one in tellers[probe_id] if one in ranks]
        return min(found, default=None)

    return ProbeAnswer(
        probe.id,
        answer.text,
        exact_match(answer.text, probe.answers),
        token_f1(answer.text, probe.answers),
        rank(probe.id),
        rank(asked.contested_by),
        any(holds_answer(f"{one.title} {one.text}", probe.answers) for one in answer.experts),
        tuple((one.passage_id, one.weight, one.batch_id) for one in answer.experts),
        bare.get(probe.id),
    )


# The untouched model, which locality and residue are compared with


def _untouched(store: KnowledgeStore, asked: Sequence[Asked], probes: Mapping[int, Probe]) -> dict[int, str]:
    """What the bare model answers to questions that no live passage should answer, by probe; it is asked each once."""
    chosen = [one.probe_id for one in asked if one.state == "gone" or probes[one.probe_id].kind == "locality"]
    keys = {_key(store, probes[probe_id].question): probes[probe_id].question for probe_id in chosen}
    log = store.catalog.audits
    known = log.untouched(list(keys))
    new = [(key, question) for key, question in keys.items() if key not in known]
    known |= dict(zip((key for key, _ in new), _bare_answers(store, [question for _, question in new]), strict=True))
    log.add_untouched([(key, question, known[key]) for key, question in new])
    return {probe_id: known[_key(store, probes[probe_id].question)] for probe_id in chosen}


def _key(store: KnowledgeStore, question: str) -> str:
    how = (store.models.fingerprints["llm"], _precision(store), repr(store.generation), question)
    return hashlib.sha256("\0".join(how).encode()).hexdigest()[:32]


def _bare_answers(store: KnowledgeStore, questions: Sequence[str]) -> list[str]:
    from knowstore.experts import Prompt, generate

    llm, how = store.models.llm, store.generation
    return [generate(llm, [Prompt("", question_prompt(one))], None, 0, how)[0].text for one in questions]
