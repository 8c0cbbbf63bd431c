"""The one writer: a lock that the operating system or the database server frees when its holder dies."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from knowstore.catalog.database import Database
from knowstore.errors import CatalogError, StoreLockedError

_POLL_S = 0.05
_ADVISORY_CLASS = 0x6B6E7374  # "knst": keeps this lock apart from other programs' advisory locks


def writer_lock(database: Database, timeout_s: float) -> AbstractContextManager[None]:
    """Hold the catalog's writer lock; a second holder is refused, also from a thread of this process.

    Raises:
        StoreLockedError: somebody else still holds it after `timeout_s` seconds; names them when known.
    """
    if database.is_sqlite:
        return file_lock(database.path, timeout_s)
    return _advisory_lock(database, timeout_s)


@contextmanager
def file_lock(path: Path, timeout_s: float = 0.0) -> Iterator[None]:
    """Hold the lock beside a file or folder, `path` with `.lock` at its end; the system frees a dead process's.

    Raises:
        StoreLockedError: somebody else still holds it after `timeout_s` seconds; names them when known.
        CatalogError: there can be no lock there.
    """
    note = path.with_name(path.name + ".lock.json")
    lock = FileLock(path.with_name(path.name + ".lock"), timeout=max(timeout_s, 0.0))
    try:
        lock.acquire(poll_interval=_POLL_S)
    except Timeout as error:
        raise _locked(_read_note(note)) from error
    except OSError as error:
        raise CatalogError(
            f"the writer lock {lock.lock_file} cannot be taken: {error.strerror}",
            kept="nothing was changed",
            fix="make the store's folder exist and be writable",
        ) from error
    try:
        with suppress(OSError):  # the note only tells others who holds the lock
            note.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "command": _command()}))
        yield
    finally:
        with suppress(OSError):
            note.unlink()
        lock.release()


def _read_note(note: Path) -> str:
    try:
        holder = json.loads(note.read_text())
        return f"pid {holder['pid']} on {holder['host']}, `{holder['command']}`"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def _advisory_lock(database: Database, timeout_s: float) -> Iterator[None]:
    """A session's advisory lock, one per schema, on a connection that lives as long as the lock."""
    with database.translated_errors():
        connection = database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.detach()  # closing it ends the session, and with it the lock
    try:
        with database.translated_errors():
            for name, value in _session_settings().items():
                connection.execute(text("SELECT set_config(:name, :value, false)"), {"name": name, "value": value})
            deadline = time.monotonic() + timeout_s
            while not connection.scalar(text(_TRY_LOCK)):
                if time.monotonic() >= deadline:
                    raise _locked(_advisory_holder(database.engine))
                time.sleep(_POLL_S)
        yield
    finally:
        with suppress(DBAPIError):  # a lost connection has lost the lock as well
            connection.execute(text(_UNLOCK))  # the server ends a closed session a while later: free the lock now
        connection.close()


def _session_settings() -> dict[str, str]:
    """Tell others who holds the lock, and free it within a minute when the holder's machine vanished."""
    return {
        "application_name": f"knowstore pid {os.getpid()} on {socket.gethostname()[:24]} {_command()}"[:63],
        "tcp_keepalives_idle": "30",
        "tcp_keepalives_interval": "10",
        "tcp_keepalives_count": "3",
    }


_TRY_LOCK = f"SELECT pg_try_advisory_lock({_ADVISORY_CLASS}, hashtext(coalesce(current_schema(), '')))"
_UNLOCK = "SELECT pg_advisory_unlock_all()"
_HOLDER = f"""
    SELECT a.application_name, a.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
    WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 AND l.classid = CAST({_ADVISORY_CLASS} AS oid)
      AND CAST(l.objid AS bigint) = (CAST(hashtext(coalesce(current_schema(), '')) AS bigint) & 4294967295)
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


def _advisory_holder(engine: Engine) -> str:
    with engine.begin() as connection:
        holder = connection.execute(text(_HOLDER)).first()
    return f"{holder.application_name} (server process {holder.pid})" if holder else ""


def _locked(holder: str) -> StoreLockedError:
    return StoreLockedError(
        f"another writer holds the store{': ' + holder if holder else ''}",
        kept="nothing was changed",
        fix="wait until it has finished, then try again; a writer that dies frees the lock by itself",
    )


def _command() -> str:
    """What this process was started as, short, without passwords of URLs."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    return " ".join([name, *map(_without_passwords, sys.argv[1:])])[:120]


def _without_passwords(argument: str) -> str:
    """A password may hold blanks, and signs that belong into a URL only when they are escaped."""
    shown = re.sub(r"://.*@", "://***@", argument, flags=re.DOTALL)
    return re.sub(r"(password|passfile)=[^&]*", r"\1=***", shown)
