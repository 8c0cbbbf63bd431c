"""Where the stores of trials are: a folder each, with the catalog in it or in a database of its own on a server."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from sqlalchemy import make_url

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Place:
    """A store's folder, and its catalog's URL where that is elsewhere. The folder's path names the database too."""

    folder: Path
    server: str | None = None

    @property
    def catalog_url(self) -> str | None:
        if self.server is None:
            return None
        return make_url(self.server).set(database=self._database).render_as_string(hide_password=False)

    @property
    def _database(self) -> str:
        return "_".join(self.folder.parts[-4:])

    def begin(self, like: Place | None = None) -> None:
        """Make room for a store, or copy one that nobody has open."""
        if like is not None:
            shutil.copytree(like.folder, self.folder)
        if self.server is not None:
            template = "" if like is None else f' TEMPLATE "{like._database}"'
            self._command(f'CREATE DATABASE "{self._database}"{template}')

    def end(self) -> None:
        """Delete the store."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.server is not None:
            self._command(f'DROP DATABASE IF EXISTS "{self._database}" WITH (FORCE)')

    def settle(self) -> None:
        """Wait until the server has seen that those who had the catalog open are dead: it takes a moment."""
        if self.server is None:
            return
        until = time.monotonic() + _PATIENCE_S
        with psycopg.connect(self.server, autocommit=True) as connection:
            while connection.execute("SELECT 1 FROM pg_stat_activity WHERE datname = %s", [self._database]).fetchone():
                if time.monotonic() > until:
                    raise TimeoutError(f"{self._database} is still open")
                time.sleep(0.005)

    def _command(self, statement: str) -> None:
        with psycopg.connect(self.server or "", autocommit=True) as connection:
            connection.execute(statement.encode())


@contextmanager
def copied(place: Place, like: Place | None) -> Iterator[Place]:
    """A copy of a store, or room for one, as long as the block lasts."""
    place.begin(like)
    try:
        yield place
    finally:
        place.end()
