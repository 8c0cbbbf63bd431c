"""The first schema: edit batches, placements, purges, settings and fingerprints.

Revision ID: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "edit_batches",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("committed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("n_added", sa.Integer, nullable=False),
        sa.Column("n_removed", sa.Integer, nullable=False),
        sa.Column("n_superseded", sa.Integer, nullable=False),
        sa.Column("passages_version_before", sa.Integer, nullable=True),
        sa.Column("passages_version_after", sa.Integer, nullable=True),
        sa.Column("experts_version_before", sa.Integer, nullable=True),
        sa.Column("experts_version_after", sa.Integer, nullable=True),
        sa.CheckConstraint("state IN ('staged', 'live', 'discarded')", name=op.f("ck_edit_batches_state")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_edit_batches")),
        sqlite_autoincrement=True,
    )
    staged = sa.text("state = 'staged'")
    op.create_index(
        "uq_edit_batches_staged", "edit_batches", ["state"], unique=True, sqlite_where=staged, postgresql_where=staged
    )

    op.create_table(
        "placements",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("passage_id", sa.CHAR(32), nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("added_batch", sa.Integer, nullable=False),
        sa.Column("removed_batch", sa.Integer, nullable=True),
        sa.Column("reason", sa.Text, nullable=True),
        sa.CheckConstraint("reason IN ('removed', 'superseded', 'rolled_back')", name=op.f("ck_placements_reason")),
        sa.CheckConstraint("(removed_batch IS NULL) = (reason IS NULL)", name=op.f("ck_placements_reason_given")),
        sa.CheckConstraint("removed_batch > added_batch", name=op.f("ck_placements_interval")),
        sa.ForeignKeyConstraint(
            ["added_batch"], ["edit_batches.id"], name=op.f("fk_placements_added_batch_edit_batches")
        ),
        sa.ForeignKeyConstraint(
            ["removed_batch"], ["edit_batches.id"], name=op.f("fk_placements_removed_batch_edit_batches")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_placements")),
    )
    for column in ("passage_id", "source", "added_batch", "removed_batch"):
        op.create_index(op.f(f"ix_placements_{column}"), "placements", [column])
    live = sa.text("removed_batch IS NULL")
    op.create_index(
        "uq_placements_live",
        "placements",
        ["passage_id", "source"],
        unique=True,
        sqlite_where=live,
        postgresql_where=live,
    )

    op.create_table(
        "purges",
        sa.Column("passage_id", sa.CHAR(32), nullable=False),
        sa.Column("batch_id", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["edit_batches.id"], name=op.f("fk_purges_batch_id_edit_batches")),
        sa.PrimaryKeyConstraint("passage_id", "batch_id", name=op.f("pk_purges")),
    )
    op.create_table(
        "settings",
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("value", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_settings")),
    )
    op.create_table(
        "fingerprints",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fingerprints")),
        sa.UniqueConstraint("digest", name=op.f("uq_fingerprints_digest")),
    )


def downgrade() -> None:
    for table in ("fingerprints", "settings", "purges", "placements", "edit_batches"):
        op.drop_table(table)
