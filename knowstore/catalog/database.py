"""The catalog's database: URLs, connections, transactions, and what its errors mean."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    ARRAY,
    URL,
    ColumnElement,
    Connection,
    Engine,
    any_,
    bindparam,
    cast,
    create_engine,
    event,
    func,
    make_url,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import InstrumentedAttribute

from knowstore.catalog.tables import Base
from knowstore.errors import CatalogError, ConfigError, SchemaError, StoreLockedError

_T = TypeVar("_T", int, str)
BUSY_TIMEOUT_S = 30
_POLL_S = 0.02
_KEPT = "the catalog is as it was before this call"


class Database:
    """One SQLite file or PostgreSQL database: connections and transactions, no knowledge of batches."""

    def __init__(self, url: str | Path) -> None:
        self.url = _parse(url)
        self.engine = self.new_engine()
        self._writing = self.engine.execution_options(knowstore_begin="BEGIN IMMEDIATE")

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @property
    def path(self) -> Path:
        """The SQLite file; it need not exist yet."""
        return Path(self.url.database or "")

    @property
    def name(self) -> str:
        """The URL as it may be shown: without any password, and so without what options are set to."""
        shown = self.url.set(query={key: "***" for key in self.url.query if key.isidentifier()})
        if self.is_sqlite and shown.database:  # a server's URL with a wrong scheme
            shown = shown.set(database=re.sub("(?s):.*@", ":***@", shown.database))
        return shown.render_as_string(hide_password=True)

    def new_engine(self, *, foreign_keys: bool = True) -> Engine:
        """An engine of its own; a migration opens one that leaves SQLite's foreign keys unenforced."""
        if not self.is_sqlite:
            try:
                return create_engine(self.url, pool_pre_ping=True, hide_parameters=True)
            except (ArgumentError, ValueError):
                raise _bad_url("the catalog's URL has options that psycopg does not take") from None
            except ImportError as error:
                raise ConfigError(
                    f"the catalog {self.name} needs psycopg, which is not installed",
                    kept="nothing was opened",
                    fix="run `pip install 'knowstore[postgres]'`",
                ) from error
        path = self.path

        def connect() -> sqlite3.Connection:
            connection = _connected(path)
            connection.isolation_level = None  # transactions begin where SQLAlchemy says so, not at the first INSERT
            connection.execute("PRAGMA secure_delete = ON").close()  # what a purge deletes is overwritten
            connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}").close()
            return connection

        engine = create_engine(self.url, hide_parameters=True, creator=connect)

        @event.listens_for(engine, "checkout")
        def _look_again(connection: sqlite3.Connection, record: Any, _proxy: object) -> None:
            if isinstance(connection, _Unchanging) and record.info.setdefault("is_used", False):
                raise DisconnectionError  # by now somebody may be writing
            record.info["is_used"] = True

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            found = connection.connection.dbapi_connection
            if isinstance(found, _Unchanging) and "knowstore_begin" in connection.get_execution_options():
                raise OperationalError("BEGIN", None, found.cause) from found.cause
            connection.exec_driver_sql(connection.get_execution_options().get("knowstore_begin", "BEGIN"))

        return engine

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads; on SQLite it sees one state and waits for no writer."""
        with self.translated_errors(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write; on SQLite it takes the write lock at once, so it cannot fail half-way."""
        with self.translated_errors(), self._writing.begin() as connection:
            yield connection

    def wipe(self) -> None:
        """Leave nothing of deleted rows in SQLite's write-ahead log."""
        if self.is_sqlite:
            with self.translated_errors(), closing(self.engine.raw_connection()) as connection:
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").close()

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Turn errors of SQLAlchemy and SQLite, and of bad values, into a `CatalogError` that says what to do."""
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise self._translate(error) from error
        except UnicodeEncodeError as error:
            raise CatalogError(
                f"the catalog {self.name} cannot store {error.object[:80]!a}: it is not valid Unicode",
                kept=_KEPT,
                fix="write the note anew, rename the file, or give the source another name",
            ) from error
        except (ValueError, TypeError) as error:  # a date or JSON that was changed by hand
            raise CatalogError(
                f"the catalog {self.name} holds what cannot be read: {error}",
                kept=_KEPT,
                fix="run `knowstore verify` to see what is damaged, and restore the catalog from a backup",
            ) from error

    def _translate(self, error: SQLAlchemyError | sqlite3.Error) -> CatalogError:
        cause = (error.orig if isinstance(error, DBAPIError) else None) or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        what = f"the catalog {self.name} failed: {reason}"
        state = getattr(cause, "sqlstate", None)
        if state in ("42P01", "42703") or reason.startswith(("no such table", "no such column")):
            return SchemaError(what, kept=_KEPT, fix="run `knowstore db upgrade`")
        if not self.is_sqlite:
            fix = "check that the server runs and that the URL's host, database, user and password are right"
            return CatalogError(
                what, kept=_KEPT, fix=fix if state is None or state[:2] in ("08", "28", "3D") else _RETRY
            )
        if "locked" in reason:
            return StoreLockedError(what, kept=_KEPT, fix="wait until the other process has committed, then try again")
        for symptom, fix in _SQLITE_FIXES.items():
            if symptom in reason:
                return CatalogError(what, kept=_KEPT, fix=fix)
        return CatalogError(what, kept=_KEPT, fix=_RETRY)

    def close(self) -> None:
        self.engine.dispose()

    def among(
        self, column: InstrumentedAttribute[_T] | InstrumentedAttribute[_T | None], values: Collection[_T]
    ) -> ColumnElement[bool]:
        """`column IN values` as one parameter, so that any number of values fits in one statement."""
        if self.is_sqlite:
            each = func.json_each(json.dumps(list(values))).table_valued("value")
            return column.in_(select(each.c.value))
        return column == any_(cast(bindparam(None, list(values)), ARRAY(column.type)))

    def insert(self, table: type[Base]) -> sqlite.Insert | postgresql.Insert:
        """The dialect's INSERT, which knows ON CONFLICT."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)


class _Unchanging(sqlite3.Connection):
    """A connection that takes the file for one that nobody changes; `cause` is why it cannot be written."""

    cause: sqlite3.OperationalError


def _connected(path: Path) -> sqlite3.Connection:
    """A connection that keeps a write-ahead log; where none can be begun, as on a read-only or a full disk, and no
    other process has one, a connection that reads the file alone."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
    try:
        _keep_a_log(connection)
    except sqlite3.OperationalError as error:
        connection.close()
        log = path.with_name(f"{path.name}-wal")
        is_alone = not (log.exists() and log.stat().st_size) and path.is_file() and path.stat().st_size
        if error.sqlite_errorcode & 0xFF not in _CANNOT_WRITE or not is_alone:
            raise
        alone = f"{path.as_uri()}?mode=ro&immutable=1"
        connection = sqlite3.connect(
            alone, uri=True, timeout=BUSY_TIMEOUT_S, check_same_thread=False, factory=_Unchanging
        )
        connection.cause = error
    return connection


def _keep_a_log(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log, once in a file's life; SQLite does not wait there for another that writes."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").close()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
            time.sleep(_POLL_S)
        else:
            return


_CANNOT_WRITE = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL}
_RETRY = "try again; if it fails again, run `knowstore db check`"
_RESTORE = "restore the file from a backup, or move it away and ingest again"
_SQLITE_FIXES = {
    "not a database": _RESTORE,
    "malformed": _RESTORE,
    "unable to open": "check that the folder exists, that the path is a file, and that you may read and write it",
    "readonly": "make the file and its folder writable",
    "full": "free some disk space, then try again",
    "disk I/O error": "free some disk space, or see whether the disk is sound, then try again",
}


def _parse(reference: str | Path) -> URL:
    """A checked URL; parse errors are not chained because they may quote a part of the password."""
    if isinstance(reference, Path):
        return URL.create("sqlite", database=str(reference.resolve()))
    try:
        reference.encode()
        url = make_url(reference)
    except (ArgumentError, ValueError):
        raise _bad_url("the catalog's URL cannot be read") from None
    match url.drivername:
        case "postgresql" | "postgres" | "postgresql+psycopg":
            if "@" in f"{url.host}{url.database}":  # what follows an unencoded @ of the password
                raise _bad_url("the catalog's URL has more than one @")
            return url.set(drivername="postgresql+psycopg")
        case "sqlite" | "sqlite+pysqlite":
            if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
                raise _bad_url("the catalog's URL names no file, and other processes must be able to open it")
            if url.query:
                raise _bad_url(f"the catalog's URL has options that SQLite does not take: {', '.join(url.query)}")
            if url.host or url.username or url.password:
                raise _bad_url("the catalog's URL names a host or a user, which SQLite has not")
            if "\0" in url.database:
                raise _bad_url("the catalog's URL holds a NUL byte")
            return url.set(drivername="sqlite", database=str(Path(url.database).resolve()))
        case other:
            raise _bad_url(f"the catalog's URL names the database {other!r}")


def _bad_url(what: str) -> ConfigError:
    return ConfigError(
        what,
        kept="nothing was opened",
        fix="use `sqlite:///path/to/catalog.db` or `postgresql://user:password@host/database`, "
        "with special characters of the password percent-encoded",
    )
