"""Probes, audits, every answer in them, and the untouched model's answers.

Revision ID: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "probes",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("batch_id", sa.Integer, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("question", sa.Text, nullable=False),
        sa.Column("answers", sa.JSON, nullable=False),
        sa.Column("passage_id", sa.CHAR(32), nullable=True),
        sa.CheckConstraint(
            "kind IN ('reliability', 'paraphrase', 'locality', 'portability', 'removed')", name=op.f("ck_probes_kind")
        ),
        sa.ForeignKeyConstraint(["batch_id"], ["edit_batches.id"], name=op.f("fk_probes_batch_id_edit_batches")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_probes")),
    )
    for column in ("batch_id", "passage_id"):
        op.create_index(op.f(f"ix_probes_{column}"), "probes", [column])

    op.create_table(
        "audits",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("batch_id", sa.Integer, nullable=False),
        sa.Column("mode", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("options", sa.JSON, nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["edit_batches.id"], name=op.f("fk_audits_batch_id_edit_batches")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audits")),
    )
    op.create_table(
        "audit_answers",
        sa.Column("audit_id", sa.Integer, nullable=False),
        sa.Column("probe_id", sa.Integer, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("contested_by", sa.Integer, nullable=True),
        sa.Column("text", sa.Text, nullable=True),
        sa.Column("em", sa.Double, nullable=True),
        sa.Column("f1", sa.Double, nullable=True),
        sa.Column("rank", sa.Integer, nullable=True),
        sa.Column("contested_rank", sa.Integer, nullable=True),
        sa.Column("is_told", sa.Boolean, nullable=True),
        sa.Column("experts", sa.JSON, nullable=True),
        sa.Column("untouched", sa.Text, nullable=True),
        sa.CheckConstraint("state IN ('current', 'contested', 'gone')", name=op.f("ck_audit_answers_state")),
        sa.ForeignKeyConstraint(["audit_id"], ["audits.id"], name=op.f("fk_audit_answers_audit_id_audits")),
        sa.ForeignKeyConstraint(["probe_id"], ["probes.id"], name=op.f("fk_audit_answers_probe_id_probes")),
        sa.ForeignKeyConstraint(["contested_by"], ["probes.id"], name=op.f("fk_audit_answers_contested_by_probes")),
        sa.PrimaryKeyConstraint("audit_id", "probe_id", name=op.f("pk_audit_answers")),
    )
    op.create_index(op.f("ix_audit_answers_probe_id"), "audit_answers", ["probe_id"])

    op.create_table(
        "untouched_answers",
        sa.Column("key", sa.CHAR(32), nullable=False),
        sa.Column("question", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_untouched_answers")),
    )


def downgrade() -> None:
    for table in ("untouched_answers", "audit_answers", "audits", "probes"):
        op.drop_table(table)
