"""What audits found: the forgetting matrix, and what became of other questions, contested facts and removed ones."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from knowstore.audits.roles import FACTS, roles_at
from knowstore.catalog import AuditLog, Score
from knowstore.evaluation import (
    ForgettingMatrix,
    average_score,
    backward_transfer,
    bootstrap_interval,
    exact_match,
    forgetting_matrix,
    forward_effect,
    grouped_interval,
    holds_answer,
    normalise,
    paired_p_value,
    proportion_interval,
    token_f1,
)
from knowstore.records import Audit, Mode, Probe, ProbeAnswer
from knowstore.store import KnowledgeStore

Figures = dict[str, object]


@dataclass(frozen=True)
class History:
    """Scores of all audits of a mode, by audited batch and probe, of the facts that still hold.

    A probe whose passage was removed since, or that a newer one contests, is left out of every row, asked since or not:
    what is not to be known any more is not forgotten.
    """

    rows: dict[int, dict[int, Score]]

    @classmethod
    def of(cls, scores: Iterable[Score], current: Collection[int]) -> History:
        """From scores, oldest audit first, and the probes of facts that still hold; of several audits after one batch
        the latest counts."""
        rows: dict[int, dict[int, Score]] = defaultdict(dict)
        for score in scores:
            rows[score.after][score.probe_id] = score
        facts = {
            after: {
                probe_id: one
                for probe_id, one in row.items()
                if probe_id in current and one.kind in FACTS and one.state == "current"
            }
            for after, row in sorted(rows.items())
        }
        return cls({after: row for after, row in facts.items() if row})

    @property
    def is_uneven(self) -> bool:
        """Whether a batch was asked other questions at one time than at another."""
        asked: dict[int, set[frozenset[int]]] = defaultdict(set)
        for row in self.rows.values():
            groups: dict[int, set[int]] = defaultdict(set)
            for probe_id, one in row.items():
                groups[one.batch_id].add(probe_id)
            for batch_id, group in groups.items():
                asked[batch_id].add(frozenset(group))
        return any(len(sets) > 1 for sets in asked.values())

    def matrix(self, score: Callable[[Score], float]) -> ForgettingMatrix:
        """`R[t, i]` of one score."""
        return forgetting_matrix(
            (after, one.batch_id, score(one)) for after, row in self.rows.items() for one in row.values()
        )

    def last_groups(self, score: Callable[[Score], float]) -> list[list[float]]:
        """Scores of the last audit by batch."""
        groups: dict[int, list[float]] = defaultdict(list)
        for one in list(self.rows.values())[-1].values():
            groups[one.batch_id].append(score(one))
        return list(groups.values())

    def changes(self, score: Callable[[Score], float]) -> list[list[float]]:
        """By batch, for each probe that was asked before the last audit too: its last score minus its first."""
        *earlier, last = self.rows.values()
        groups: dict[int, list[float]] = defaultdict(list)
        for probe_id, one in last.items():
            first = next((row[probe_id] for row in earlier if probe_id in row), None)
            if first is not None:
                groups[one.batch_id].append(score(one) - score(first))
        return list(groups.values())


def summarise(store: KnowledgeStore, mode: Mode) -> Figures:
    """All finished audits of a mode as one record of fractions with 95 % intervals, of scores by bootstrap and of
    shares by Wilson.

    Rows of `matrix` and `matrix_f1` are the audited batches `audited`, columns `batches`; null where nothing was
    asked. Both hold the facts that still hold, see `History`; `uneven` says that a batch was asked other questions at
    one time than at another, so that rows compare different ones. `same_probes` compares each probe's last score with
    its first all the same. The averages are those of the last audit, None when it asked for no fact.
    """
    log = store.catalog.audits
    probes = log.probes()
    audits = [audit for audit in log.audits() if audit.mode == mode]
    at = audits[-1].batch_id if audits else store.catalog.head()
    current = {one.probe_id for one in roles_at(store, probes, at).values() if one.state == "current"}
    history = History.of(log.scores(mode), current)
    em, f1 = history.matrix(_em), history.matrix(_f1)
    is_asked = bool(history.rows) and max(history.rows) == at  # else the last audit asked for no fact
    return {
        "mode": mode,
        "matrix": em.rows(),
        "matrix_f1": f1.rows(),
        "matrix_n": em.counts.tolist(),
        "audited": list(em.after),
        "batches": list(em.batches),
        "uneven": history.is_uneven,
        "average": _known(average_score(em)) if is_asked else None,
        "average_ci": _interval(history.last_groups(_em)) if is_asked else None,
        "average_f1": _known(average_score(f1)) if is_asked else None,
        "average_f1_ci": _interval(history.last_groups(_f1)) if is_asked else None,
        "bwt": _known(backward_transfer(em)) if is_asked else None,
        "bwt_f1": _known(backward_transfer(f1)) if is_asked else None,
        "same_probes": {"em": _change(history, _em), "f1": _change(history, _f1)} if history.rows else None,
        "forward": _known(forward_effect(em)) if is_asked else None,
        "forward_f1": _known(forward_effect(f1)) if is_asked else None,
        **measure(_latest_answers(log, audits), {probe.id: probe for probe in probes}),
    }


def _latest_answers(log: AuditLog, audits: Sequence[Audit]) -> list[ProbeAnswer]:
    """The latest answer of each probe that was asked after the batch that was audited last."""
    found: dict[int, ProbeAnswer] = {}
    for audit in audits:
        if audit.batch_id == audits[-1].batch_id:
            found |= {answer.probe_id: answer for answer in log.answers(audit.id)}
    return list(found.values())


def measure(answers: Sequence[ProbeAnswer], probes: Mapping[int, Probe]) -> Figures:
    """Figures of one audit: `kinds`, `locality`, `contradictions`, `residue`."""
    kinds = {
        kind: _scores([one for one in answers if one.state == "current" and probes[one.probe_id].kind == kind], probes)
        for kind in FACTS
    }
    told = [one for one in answers if one.text is not None]  # what a purge has blanked can be compared no more
    unrelated = [one for one in told if probes[one.probe_id].kind == "locality"]
    contested = [one for one in told if one.state == "contested" and one.contested_by is not None]
    both = [one for one in contested if one.rank is not None and one.contested_rank is not None]
    gone = [one for one in answers if one.state == "gone"]
    return {
        "kinds": {kind: found for kind, found in kinds.items() if found["n"]},
        "locality": _locality(unrelated, probes),
        "contradictions": {
            **_contradictions(contested, probes), "both_retrieved": _contradictions(both, probes)
        },
        "residue": _residue(gone, probes),
    }  # fmt: skip


def _scores(answers: Sequence[ProbeAnswer], probes: Mapping[int, Probe]) -> Figures:
    with_passage = [one for one in answers if probes[one.probe_id].passage_id]  # others may be answered from any
    return {
        "n": len(answers),
        **_mean("em", [one.em for one in answers]),
        **_mean("f1", [one.f1 for one in answers]),
        **_share("retrieved", [one.rank is not None for one in with_passage]),
        **_share("told", [one.is_told for one in answers]),
    }


def _locality(answers: Sequence[ProbeAnswer], probes: Mapping[int, Probe]) -> Figures:
    """How many unrelated questions are answered as the untouched model answers them."""
    known = [(probes[one.probe_id], one, one.untouched) for one in answers if one.untouched is not None]
    checked = [(probe, one, text) for probe, one, text in known if probe.answers]
    return {
        "n": len(known),
        **_share("same", [normalise(one.text or "") == normalise(text) for _, one, text in known]),
        **_share("mounted", [bool(one.experts) for _, one, _ in known]),
        **_mean("em", [one.em for _, one, _ in checked]),
        **_mean("em_untouched", [exact_match(text, probe.answers) for probe, _, text in checked]),
    }


def newer_wins(answer: ProbeAnswer, newer: Probe) -> float:
    """1.0 when a contested question is answered rather as the newer probe accepts, 0.0 as the older, else 0.5."""
    difference = token_f1(answer.text or "", newer.answers) - answer.f1
    return 0.5 if not difference else float(difference > 0)


def _contradictions(answers: Sequence[ProbeAnswer], probes: Mapping[int, Probe]) -> Figures:
    """Which of two facts was told; `rate` is the newer's share of those where either was."""
    rivals = [(one, probes[one.contested_by]) for one in answers if one.contested_by is not None]
    outcomes = [newer_wins(one, rival) for one, rival in rivals]
    decided = [outcome for outcome in outcomes if outcome != 0.5]
    return {
        "n": len(outcomes),
        "newer": outcomes.count(1.0),
        "older": outcomes.count(0.0),
        "neither": outcomes.count(0.5),
        "newer_exact": sum(exact_match(one.text or "", rival.answers) == 1.0 for one, rival in rivals),
        "older_exact": sum(one.em == 1.0 for one, _ in rivals),
        **_share("rate", [outcome == 1.0 for outcome in decided]),
    }


def _residue(answers: Sequence[ProbeAnswer], probes: Mapping[int, Probe]) -> Figures:
    """How many removed facts are still told, by answers that hold an accepted one: `answered` in all, the share
    `still`, `exactly` by nothing else, `known` to the untouched model, `told` by a live passage that was mounted, and
    `leaked`, the share `rate`, which nothing explains."""
    answered = [one for one in answers if tells(one.text, one.em, probes[one.probe_id].answers)]
    still = {one.probe_id for one in answered}
    known = {one.probe_id for one in answered if _is_known(one, probes[one.probe_id])}
    told = {one.probe_id for one in answered if one.is_told} - known
    leaked = still - known - told
    return {
        "n": len(answers),
        "answered": len(answered),
        "exactly": sum(one.em == 1.0 for one in answered),
        "known": len(known),
        "told": len(told),
        "leaked": len(leaked),
        "retrieved": sum(one.rank is not None for one in answers),
        **_share("still", [one.probe_id in still for one in answers]),
        **_share("rate", [one.probe_id in leaked for one in answers]),
    }


def _is_known(answer: ProbeAnswer, probe: Probe) -> bool:
    text = answer.untouched or ""
    return tells(text, exact_match(text, probe.answers), probe.answers)


def tells(text: str | None, em: float, accepted: Sequence[str]) -> bool:
    """Whether an answer tells an accepted one, exactly or within a sentence; of a text that was purged only the exact
    match is left."""
    return em == 1.0 or holds_answer(text or "", accepted)


def _change(history: History, score: Callable[[Score], float]) -> Figures:
    groups = history.changes(score)
    pooled = [change for group in groups for change in group]
    means = [sum(group) / len(group) for group in groups]
    return {
        "n": len(pooled),
        "change": sum(means) / len(means) if means else None,
        "change_ci": _interval(groups),
        "gained": sum(change > 0 for change in pooled),
        "lost": sum(change < 0 for change in pooled),
        "p": paired_p_value(pooled) if pooled else None,
    }


def _mean(name: str, scores: Sequence[float]) -> Figures:
    if not scores:
        return {name: None, f"{name}_ci": None}
    return {name: sum(scores) / len(scores), f"{name}_ci": list(bootstrap_interval(scores))}


def _share(name: str, cases: Sequence[bool]) -> Figures:
    if not cases:
        return {name: None, f"{name}_ci": None}
    return {name: sum(cases) / len(cases), f"{name}_ci": list(proportion_interval(sum(cases), len(cases)))}


def _interval(groups: Sequence[Sequence[float]]) -> list[float] | None:
    return list(grouped_interval(groups)) if groups else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _em(score: Score) -> float:
    return score.em


def _f1(score: Score) -> float:
    return score.f1
