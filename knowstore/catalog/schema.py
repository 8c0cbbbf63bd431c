"""The schema's revisions: which one a database has, which one this version knows, and how to get there."""

from __future__ import annotations

import logging
import threading
from functools import cache
from importlib import resources

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from knowstore.catalog.database import Database
from knowstore.catalog.tables import Base
from knowstore.errors import SchemaError

_logger = logging.getLogger(__name__)
_alembic = threading.Lock()  # alembic keeps the running migration in module globals


def head_revision() -> str:
    """The newest revision this version of knowstore knows."""
    return known_revisions()[0]


def known_revisions() -> tuple[str, ...]:
    """All revisions this version of knowstore knows, newest first."""
    return _revisions(_config().get_main_option("script_location") or "")


@cache
def _revisions(script_location: str) -> tuple[str, ...]:
    config = Config()
    config.set_main_option("script_location", script_location.replace("%", "%%"))
    return tuple(script.revision for script in ScriptDirectory.from_config(config).walk_revisions())


def current_revision(database: Database) -> str | None:
    """The database's revision, None when it has no catalog yet.

    Raises:
        SchemaError: the revision is not one that this version knows.
    """
    with database.read() as connection:
        revisions = MigrationContext.configure(connection).get_current_heads()
    if unknown := set(revisions) - set(known_revisions()):
        raise SchemaError(
            f"the catalog {database.name} has schema {', '.join(sorted(unknown))}; "
            f"this version of knowstore knows up to {head_revision()}",
            kept="the catalog was not touched",
            fix="upgrade knowstore to the version that wrote this store, "
            "or check that the URL does not name another program's database",
        )
    return revisions[0] if revisions else None


def upgrade(database: Database) -> None:
    """Bring the schema to this version's head, in one transaction; does nothing when it is there already.

    The caller holds the writer lock, so that two processes never migrate at once.
    """
    config = _config()
    engine = database.new_engine(foreign_keys=False)
    try:
        with (
            _alembic,
            database.translated_errors(),
            engine.execution_options(knowstore_begin="BEGIN IMMEDIATE").begin() as connection,
        ):
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            if database.is_sqlite:
                _check_foreign_keys(connection)
    finally:
        engine.dispose()
    _logger.info("catalog %s is at schema %s", database.name, head_revision())


def differences(database: Database) -> list[str]:
    """How the database's tables differ from what this version expects, one line each."""
    with _alembic, database.read() as connection:
        options = {"include_name": _is_ours, "compare_type": True}
        found = compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata)
    return [" ".join(map(str, difference)) for difference in found]


def _is_ours(name: str | None, kind: str, _parents: object) -> bool:
    return kind != "table" or name in Base.metadata.tables


def _config() -> Config:
    config = Config()
    scripts = str(resources.files("knowstore._migrations"))
    config.set_main_option("script_location", scripts.replace("%", "%%"))
    return config


def _check_foreign_keys(connection: Connection) -> None:
    """Foreign keys are off while a migration copies tables; what it leaves must still satisfy them."""
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if broken:
        raise IntegrityError(f"{len(broken)} rows break a foreign key", None, ValueError(str(broken[0])))
