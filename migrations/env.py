"""Run revisions on the connection, and in the transaction, that `knowstore.catalog` hands over."""

from __future__ import annotations

from alembic import context

from knowstore.catalog.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
