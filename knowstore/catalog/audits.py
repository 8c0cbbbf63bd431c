"""Probes, audits and answers in the catalog; anyone may write them, for they change nothing that is live."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, cast

from sqlalchemy import Connection, Text, bindparam, delete, func, insert, select, update
from sqlalchemy import cast as sql_cast

from knowstore.catalog.database import Database
from knowstore.catalog.tables import AuditAnswerRow, AuditRow, ProbeRow, PurgeRow, UntouchedAnswerRow
from knowstore.catalog.values import mounted, texts
from knowstore.errors import CatalogError
from knowstore.records import Asked, Audit, Mode, Probe, ProbeAnswer, ProbeState

_PROBE = (
    ProbeRow.question,
    ProbeRow.answers,
    ProbeRow.kind,
    ProbeRow.passage_id,
    ProbeRow.batch_id,
    ProbeRow.id,
)
_AUDIT = (
    AuditRow.id,
    AuditRow.batch_id,
    AuditRow.mode,
    AuditRow.created_at,
    AuditRow.finished_at,
    AuditRow.seconds,
    AuditRow.options,
)
_ANSWER = (
    AuditAnswerRow.probe_id,
    AuditAnswerRow.text,
    AuditAnswerRow.em,
    AuditAnswerRow.f1,
    AuditAnswerRow.rank,
    AuditAnswerRow.contested_rank,
    AuditAnswerRow.is_told,
    AuditAnswerRow.experts,
    AuditAnswerRow.untouched,
    AuditAnswerRow.state,
    AuditAnswerRow.contested_by,
)
_ANSWERED = AuditAnswerRow.em.is_not(None)


class Score(NamedTuple):
    """A probe's score in a finished audit of the store after batch `after`."""

    audit_id: int
    after: int
    probe_id: int
    batch_id: int
    kind: str
    state: ProbeState
    em: float
    f1: float


class AuditLog:
    """What audits asked and what was answered, beside the edit batches in one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # Probes

    def add_probes(self, probes: Sequence[Probe], *, renewed: Collection[int] = ()) -> int:
        """Keep probes with their batches; those that are kept already are left out, but for those of facts without a
        passage that came with one of the batches `renewed`. Returns how many were new."""
        with self._database.write() as connection:
            known = {
                _content(probe)
                for probe in _probes(connection)
                if probe.passage_id is not None
                or probe.batch_id not in renewed
                or probe.kind in ("locality", "removed")
            }
            new = {_content(probe): probe for probe in probes if _content(probe) not in known}
            rows = [
                {
                    "batch_id": probe.batch_id,
                    "kind": probe.kind,
                    "question": probe.question,
                    "answers": list(probe.answers),
                    "passage_id": probe.passage_id,
                }
                for probe in new.values()
            ]
            if rows:
                connection.execute(insert(ProbeRow), rows)
        return len(rows)

    def probes(self) -> list[Probe]:
        """All probes, oldest first."""
        with self._database.read() as connection:
            return list(_probes(connection))

    # Audits

    def begin(self, batch_id: int, mode: Mode, options: dict[str, object], asked: Sequence[Asked]) -> Audit:
        """Start an audit of the store as it is after a batch; every probe that it will ask is noted at once."""
        now = datetime.now(UTC)
        with self._database.write() as connection:
            audit_id = connection.execute(
                insert(AuditRow)
                .values(batch_id=batch_id, mode=mode, created_at=now, seconds=0.0, options=options)
                .returning(AuditRow.id)
            ).scalar_one()
            rows = [
                {"audit_id": audit_id, "probe_id": one.probe_id, "state": one.state, "contested_by": one.contested_by}
                for one in asked
            ]
            if rows:
                connection.execute(insert(AuditAnswerRow), rows)
        return Audit(audit_id, batch_id, mode, now, None, 0.0, options)

    def record(self, audit_id: int, answers: Sequence[ProbeAnswer], seconds: float) -> None:
        """Keep answers of an audit as they come, and the seconds that they took; without the text of those for which a
        passage was mounted that has been purged meanwhile."""
        used = {expert[0] for one in answers for expert in one.experts}
        parameters = [
            {
                "in_audit": audit_id,
                "of_probe": one.probe_id,
                "text": _storable(one.text),
                "em": one.em,
                "f1": one.f1,
                "rank": one.rank,
                "contested_rank": one.contested_rank,
                "is_told": one.is_told,
                "experts": [list(expert) for expert in one.experts],
                "untouched": _storable(one.untouched),
            }
            for one in answers
        ]
        statement = update(AuditAnswerRow).where(
            AuditAnswerRow.audit_id == bindparam("in_audit"), AuditAnswerRow.probe_id == bindparam("of_probe")
        )
        with self._database.write() as connection:
            purged = set(
                connection.scalars(select(PurgeRow.passage_id).where(self._database.among(PurgeRow.passage_id, used)))
            )
            for values, one in zip(parameters, answers, strict=True):
                if any(expert[0] in purged for expert in one.experts):
                    values["text"] = None
            connection.execute(statement, parameters)
            connection.execute(
                update(AuditRow).where(AuditRow.id == audit_id).values(seconds=AuditRow.seconds + seconds)
            )

    def finish(self, audit_id: int) -> Audit:
        """Say that everything was asked."""
        with self._database.write() as connection:
            statement = update(AuditRow).where(AuditRow.id == audit_id).values(finished_at=datetime.now(UTC))
            connection.execute(statement)
        return self.audit(audit_id)

    def audit(self, audit_id: int) -> Audit:
        """One audit.

        Raises:
            CatalogError: there is none.
        """
        found = [audit for audit in self.audits(finished=None) if audit.id == audit_id]
        if not found:
            raise CatalogError(f"there is no audit {audit_id}", kept="nothing was changed", fix="run `knowstore audit`")
        return found[0]

    def audits(self, *, finished: bool | None = True) -> list[Audit]:
        """Audits, by when they ended: finished ones, those cut short, or (None) both, by when they began."""
        statement = select(*_AUDIT)
        if finished:
            statement = statement.where(AuditRow.finished_at.is_not(None)).order_by(AuditRow.finished_at)
        elif finished is not None:
            statement = statement.where(AuditRow.finished_at.is_(None))
        statement = statement.order_by(AuditRow.id)
        with self._database.read() as connection:
            return [Audit(**row._asdict()) for row in connection.execute(statement)]

    # Answers

    def unanswered(self, audit_id: int) -> list[Asked]:
        """What an audit has still to ask."""
        columns = (AuditAnswerRow.probe_id, AuditAnswerRow.state, AuditAnswerRow.contested_by)
        chosen = (AuditAnswerRow.audit_id == audit_id, ~_ANSWERED)
        with self._database.read() as connection:
            rows = connection.execute(select(*columns).where(*chosen).order_by(AuditAnswerRow.probe_id))
            return [Asked(row.probe_id, cast(ProbeState, row.state), row.contested_by) for row in rows]

    def answers(self, audit_id: int) -> list[ProbeAnswer]:
        """Answers of one audit, by probe; without those to probes that were lost, of which `verify` tells."""
        is_there = AuditAnswerRow.probe_id.in_(select(ProbeRow.id))
        chosen = (AuditAnswerRow.audit_id == audit_id, _ANSWERED, is_there)
        with self._database.read() as connection:
            rows = connection.execute(select(*_ANSWER).where(*chosen).order_by(AuditAnswerRow.probe_id))
            return [ProbeAnswer(**{**row._asdict(), "experts": mounted(row.experts)}) for row in rows]

    def scores(self, mode: Mode) -> list[Score]:
        """Scores of every finished audit of a mode, by when they ended."""
        statement = (
            select(
                AuditRow.id, AuditRow.batch_id, ProbeRow.id, ProbeRow.batch_id, ProbeRow.kind,
                AuditAnswerRow.state, AuditAnswerRow.em, AuditAnswerRow.f1,
            )
            .join(AuditAnswerRow, AuditAnswerRow.audit_id == AuditRow.id)
            .join(ProbeRow, ProbeRow.id == AuditAnswerRow.probe_id)
            .where(AuditRow.mode == mode, AuditRow.finished_at.is_not(None), _ANSWERED)
            .order_by(AuditRow.finished_at, AuditRow.id, ProbeRow.id)
        )  # fmt: skip
        with self._database.read() as connection:
            return [Score._make(row) for row in connection.execute(statement)]

    # The untouched model

    def untouched(self, keys: Collection[str]) -> dict[str, str]:
        """What the untouched model answered, by key, as far as it was asked."""
        chosen = self._database.among(UntouchedAnswerRow.key, keys)
        with self._database.read() as connection:
            rows = connection.execute(select(UntouchedAnswerRow.key, UntouchedAnswerRow.text).where(chosen))
            return {row.key: row.text for row in rows}

    def add_untouched(self, answers: Sequence[tuple[str, str, str]]) -> None:
        """Keep answers of the untouched model, (key, question, text) each, to questions that a probe still asks: one
        may have been purged meanwhile."""
        with self._database.write() as connection:
            among = self._database.among(ProbeRow.question, [question for _, question, _ in answers])
            asked = set(connection.scalars(select(ProbeRow.question).where(among)))
            rows = [
                {"key": key, "question": question, "text": _storable(text)}
                for key, question, text in answers
                if question in asked
            ]
            if rows:
                connection.execute(self._database.insert(UntouchedAnswerRow).on_conflict_do_nothing(), rows)

    # Purging

    def forget(self, passage_ids: Collection[str]) -> None:
        """Delete what could tell of purged passages: probes on them with their answers, and the text of every answer
        for which one was mounted; the scores of those stay, and their text is None."""
        with self._database.write() as connection:
            if not connection.scalar(select(func.count()).select_from(ProbeRow)):
                return
            for passage_id in passage_ids:
                used = sql_cast(AuditAnswerRow.experts, Text).contains(passage_id)
                connection.execute(update(AuditAnswerRow).where(used).values(text=None))
            among = self._database.among
            found = connection.execute(select(ProbeRow.id).where(among(ProbeRow.passage_id, passage_ids))).all()
            ids = [row.id for row in found]
            contested = update(AuditAnswerRow).where(among(AuditAnswerRow.contested_by, ids))
            connection.execute(contested.values(contested_by=None))
            connection.execute(delete(AuditAnswerRow).where(among(AuditAnswerRow.probe_id, ids)))
            connection.execute(delete(ProbeRow).where(among(ProbeRow.id, ids)))
            asked = select(ProbeRow.question)
            connection.execute(delete(UntouchedAnswerRow).where(UntouchedAnswerRow.question.not_in(asked)))
        self._database.wipe()


def _probes(connection: Connection) -> Iterator[Probe]:
    for row in connection.execute(select(*_PROBE).order_by(ProbeRow.id)):
        yield Probe(**{**row._asdict(), "answers": texts(row.answers)})


def _storable(text: str | None) -> str | None:
    """What every database takes: PostgreSQL has no NUL in a text."""
    return None if text is None else text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _content(probe: Probe) -> tuple[object, ...]:
    return probe.kind, probe.question, probe.answers, probe.passage_id
