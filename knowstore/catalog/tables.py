"""The catalog's tables, as SQLAlchemy sees them; `migrations/` is what creates them."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import CHAR, JSON, CheckConstraint, DateTime, Dialect, ForeignKey, Index, MetaData, Text, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, always UTC in Python; SQLite alone keeps it without its zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime(), str: Text()}  # noqa: RUF012


class BatchRow(Base):
    """One edit batch. Ids only grow, and at most one batch is staged, so ids are also the order of commits."""

    __tablename__ = "edit_batches"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    state: Mapped[str]
    created_at: Mapped[datetime]
    committed_at: Mapped[datetime | None]
    note: Mapped[str]
    n_added: Mapped[int]
    n_removed: Mapped[int]
    n_superseded: Mapped[int]
    passages_version_before: Mapped[int | None]
    passages_version_after: Mapped[int | None]
    experts_version_before: Mapped[int | None]
    experts_version_after: Mapped[int | None]

    __table_args__ = (
        CheckConstraint("state IN ('staged', 'live', 'discarded')", name="state"),
        {"sqlite_autoincrement": True},
    )


_STAGED = BatchRow.state == "staged"
Index("uq_edit_batches_staged", BatchRow.state, unique=True, sqlite_where=_STAGED, postgresql_where=_STAGED)


class PlacementRow(Base):
    """A passage is in the store from a source since `added_batch` and until `removed_batch`, exclusive."""

    __tablename__ = "placements"

    id: Mapped[int] = mapped_column(primary_key=True)
    passage_id: Mapped[str] = mapped_column(CHAR(32), index=True)
    source: Mapped[str] = mapped_column(index=True)
    added_batch: Mapped[int] = mapped_column(ForeignKey("edit_batches.id"), index=True)
    removed_batch: Mapped[int | None] = mapped_column(ForeignKey("edit_batches.id"), index=True)
    reason: Mapped[str | None]

    __table_args__ = (
        CheckConstraint("reason IN ('removed', 'superseded', 'rolled_back')", name="reason"),
        CheckConstraint("(removed_batch IS NULL) = (reason IS NULL)", name="reason_given"),
        CheckConstraint("removed_batch > added_batch", name="interval"),
    )


_LIVE = PlacementRow.removed_batch.is_(None)
Index(
    "uq_placements_live",
    PlacementRow.passage_id,
    PlacementRow.source,
    unique=True,
    sqlite_where=_LIVE,
    postgresql_where=_LIVE,
)


class PurgeRow(Base):
    """The bytes of a passage were physically removed with an edit batch."""

    __tablename__ = "purges"

    passage_id: Mapped[str] = mapped_column(CHAR(32), primary_key=True)
    batch_id: Mapped[int] = mapped_column(ForeignKey("edit_batches.id"), primary_key=True)


class SettingRow(Base):
    __tablename__ = "settings"

    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[object] = mapped_column(JSON)


class FingerprintRow(Base):
    """A model, tokenizer or hypernetwork that made rows of this store."""

    __tablename__ = "fingerprints"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    digest: Mapped[str] = mapped_column(unique=True)
    detail: Mapped[object] = mapped_column(JSON)
    created_at: Mapped[datetime]


class ProbeRow(Base):
    """A question with accepted answers that came with an edit batch, for audits to ask again."""

    __tablename__ = "probes"

    id: Mapped[int] = mapped_column(primary_key=True)
    batch_id: Mapped[int] = mapped_column(ForeignKey("edit_batches.id"), index=True)
    kind: Mapped[str]
    question: Mapped[str]
    answers: Mapped[list[str]] = mapped_column(JSON)
    passage_id: Mapped[str | None] = mapped_column(CHAR(32), index=True)

    __table_args__ = (
        CheckConstraint("kind IN ('reliability', 'paraphrase', 'locality', 'portability', 'removed')", name="kind"),
    )


class AuditRow(Base):
    """One audit of the store as it was right after `batch_id`; unfinished while `finished_at` is null."""

    __tablename__ = "audits"

    id: Mapped[int] = mapped_column(primary_key=True)
    batch_id: Mapped[int] = mapped_column(ForeignKey("edit_batches.id"))
    mode: Mapped[str]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    seconds: Mapped[float]
    options: Mapped[object] = mapped_column(JSON)


class AuditAnswerRow(Base):
    """What a probe was to an audit, and how it was answered; not yet while `em` is null. `text` is null also where a
    passage that was mounted has been purged."""

    __tablename__ = "audit_answers"

    audit_id: Mapped[int] = mapped_column(ForeignKey("audits.id"), primary_key=True)
    probe_id: Mapped[int] = mapped_column(ForeignKey("probes.id"), primary_key=True, index=True)
    state: Mapped[str]
    contested_by: Mapped[int | None] = mapped_column(ForeignKey("probes.id"))
    text: Mapped[str | None]
    em: Mapped[float | None]
    f1: Mapped[float | None]
    rank: Mapped[int | None]
    contested_rank: Mapped[int | None]
    is_told: Mapped[bool | None]
    experts: Mapped[list[list[object]] | None] = mapped_column(JSON(none_as_null=True))
    untouched: Mapped[str | None]

    __table_args__ = (CheckConstraint("state IN ('current', 'contested', 'gone')", name="state"),)


class UntouchedAnswerRow(Base):
    """What the language model answers without any expert or passage; `key` says which model, how, and what."""

    __tablename__ = "untouched_answers"

    key: Mapped[str] = mapped_column(CHAR(32), primary_key=True)
    question: Mapped[str]
    text: Mapped[str]
