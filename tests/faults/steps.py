"""The steps of a command: every statement that writes to the catalog, every commit, every write to a Lance table."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from mmap import mmap
from typing import Any

from lancedb.db import LanceDBConnection
from lancedb.merge import LanceMergeInsertBuilder
from lancedb.table import LanceTable
from sqlalchemy import Engine, event

_LANCE_WRITES = ("add", "update", "delete", "create_index", "optimize", "set_unenforced_primary_key")


class Steps:
    """Notes each step of this process in shared memory as it begins and ends; kills the process before step `kill_at`.

    `kill_at` counts from 0; the number of all steps means: behind the last one.
    """

    def __init__(self, note: mmap, kill_at: int | None = None) -> None:
        self._note, self._kill_at = note, kill_at
        self._depth = 0
        self.names: list[str] = []

    def watch(self) -> None:
        """Watch every database engine and Lance table of this process from now on."""
        for name in _LANCE_WRITES:
            self._wrap(LanceTable, name, lambda table, *_: table.name)
        self._wrap(LanceMergeInsertBuilder, "execute", lambda merge, *_: merge._table.name)
        for name in ("create_table", "drop_table"):
            self._wrap(LanceDBConnection, name, lambda connection, table, *_: table)
        event.listen(Engine, "before_cursor_execute", self._before_statement)
        event.listen(Engine, "commit", self._before_commit)

    def end(self) -> None:
        """Nothing follows: the last step that may be asked for."""
        self._begin("end")

    def _begin(self, name: str) -> None:
        if len(self.names) == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        n_before = Counter(self.names)[name]
        self.names.append(name)
        _say(self._note, name if not n_before else f"{name} ({n_before + 1})")

    def _wrap(self, owner: type, name: str, table_of: Callable[[Any], str]) -> None:
        original = getattr(owner, name)

        def watched(one: Any, *arguments: Any, **options: Any) -> Any:
            if self._depth == 0:
                self._begin(f"{table_of(one, *arguments)}.{'merge' if name == 'execute' else name}")
            self._depth += 1  # LanceDB's writes call one another
            try:
                return original(one, *arguments, **options)
            finally:
                self._depth -= 1

        setattr(owner, name, watched)

    def _before_statement(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, is_many: bool
    ) -> None:
        words = statement.split()
        if words[0].upper() in ("INSERT", "UPDATE", "DELETE", "CREATE", "ALTER", "DROP"):
            name = next(word for word in words[1:] if word.upper() not in _FILLERS)
            self._begin(f"sql {words[0].lower()} {name.strip('(')}")

    def _before_commit(self, connection: Any) -> None:
        if self.names and self.names[-1].startswith("sql "):
            self._begin("commit")


_FILLERS = {"INTO", "FROM", "TABLE", "INDEX", "UNIQUE", "ON"}


def _say(note: mmap, text: str) -> None:
    raw = text.encode()
    note[: len(raw) + 1] = raw + b"\0"


def said(note: mmap) -> str:
    """The step that a process has begun last."""
    return note[:].split(b"\0", 1)[0].decode() or "start"


def forget(note: mmap) -> None:
    note[:1] = b"\0"
