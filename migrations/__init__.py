"""Alembic revisions of the catalog's schema; a revision is frozen history."""
