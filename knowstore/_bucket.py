"""A store in an object store: every file of it is LanceDB's, and the catalog is elsewhere.

What a folder's `store.json` says is here a table of one row, `store`, beside the other tables. Making a table fails
where there is one, so that of two processes that begin a store at once one is first, as with the file.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeGuard

import lancedb
import pyarrow as pa

from knowstore._layout import FORMAT
from knowstore.errors import BankError, CatalogError, ConfigError
from knowstore.lance import LANCE_ERRORS

_NAME = "store"
_PARTS = ("passages", "experts*")


def is_url(location: str | Path) -> TypeGuard[str]:
    """Whether a store's location is one of an object store."""
    return isinstance(location, str) and "://" in location


@dataclass(frozen=True)
class Bucket:
    """A store under a URL such as `s3://bucket/prefix`; see `Layout`."""

    tables: str
    store_id: str

    @classmethod
    def open(cls, url: str, *, create: bool, catalog_url: str | None) -> Bucket:
        """Read which store is there, or begin a new one.

        Raises:
            ConfigError: no catalog is named, no store there and `create` is False, or an object store that cannot be
                reached.
        """
        url = _checked(url)
        if catalog_url is None:
            raise ConfigError(
                f"the store in {url} must have its catalog elsewhere: an object store holds no database",
                kept="nothing was made",
                fix="name it: `--catalog postgresql://user@host/name`, or `--catalog sqlite:///FILE` for one machine",
            )
        with _reaching(url):
            connection = lancedb.connect(url)
            if _NAME not in connection.list_tables().tables:
                if not create:
                    raise ConfigError(
                        f"there is no store in {url}",
                        kept="nothing was made",
                        fix="name the URL of a store with --store, or begin one: `knowstore ingest PATH`",
                    )
                _begin(connection)
            [row] = connection.open_table(_NAME).to_arrow().to_pylist()
        if row["format"] > FORMAT:
            raise ConfigError(
                f"the store in {url} was written by a newer version of knowstore",
                kept="the store is as it was",
                fix="upgrade knowstore",
            )
        return cls(url, row["store_id"])

    @staticmethod
    def is_at(url: str) -> bool:
        """Whether there is a store.

        Raises:
            ConfigError: the object store cannot be reached.
        """
        url = _checked(url)
        with _reaching(url):
            return _NAME in lancedb.connect(url).list_tables().tables

    @property
    def location(self) -> str:
        """See `Layout`."""
        return self.tables

    @property
    def own_catalog(self) -> Path | None:
        """See `Layout`."""
        return None

    @property
    def has_tables(self) -> bool:
        """See `Layout`."""
        connection = lancedb.connect(self.tables)
        return all(any(_is_whole(connection, name) for name in self._names(part)) for part in _PARTS)

    def lock(self) -> AbstractContextManager[None]:
        """The catalog's lock is the only one: an object store has none that a dead writer could not keep."""
        return nullcontext()

    def discard_tables(self) -> None:
        """See `Layout`."""
        try:
            connection = lancedb.connect(self.tables)
            for part in _PARTS:
                for name in self._names(part):
                    connection.drop_table(name)
        except LANCE_ERRORS as error:
            raise CatalogError(
                f"the tables of a batch that was never committed cannot be deleted: {error}",
                kept="the store is empty, as it was",
                fix=f"see that objects below {self.tables} can be deleted",
            ) from error

    def drop_bank(self, name: str) -> None:
        """See `Layout`."""
        try:
            lancedb.connect(self.tables).drop_table(name)
        except LANCE_ERRORS as error:
            raise BankError(
                f"the expert bank {name} in {self.tables} cannot be deleted: {error}",
                kept="every other bank",
                fix=f"see that objects below {self.tables} can be deleted, and run the command again",
            ) from error

    def sweep(self) -> None:
        """See `Layout`; tables are deleted where they are, and one that is there in part is not read."""

    def size_bytes(self) -> dict[str, int]:
        """Bytes of `passages` and `experts` in their latest versions, and `total`; `catalog` is 0, it is elsewhere."""
        sizes = {"passages": self.table_bytes(_PARTS[0]), "experts": self.table_bytes(_PARTS[1]), "catalog": 0}
        return sizes | {"total": sum(sizes.values())}

    def table_bytes(self, name: str) -> int:
        """Bytes of a table's latest version; with `*` in the name, of all that match."""
        connection = lancedb.connect(self.tables)
        stats: list[Any] = [connection.open_table(one).stats() for one in self._names(name)]
        return sum(one["total_bytes"] for one in stats)

    def _names(self, pattern: str) -> list[str]:
        names = lancedb.connect(self.tables).list_tables().tables
        return [name for name in names if fnmatchcase(name, pattern)]


def _begin(connection: lancedb.DBConnection) -> None:
    """Make the table that says which store this is, unless another process is first."""
    try:
        connection.create_table(_NAME, pa.table({"format": [FORMAT], "store_id": [uuid.uuid4().hex]}))
    except LANCE_ERRORS:
        if _NAME not in connection.list_tables().tables:
            raise


def _is_whole(connection: lancedb.DBConnection, name: str) -> bool:
    """Whether a table has a version to be read; one whose making or deleting was cut short has none."""
    try:
        connection.open_table(name)
    except LANCE_ERRORS:
        return False
    return True


def _checked(url: str) -> str:
    if not re.fullmatch(r"(s3|gs|az)://[^/?#@]+/[^?#]*[^/?#]/?", url):
        raise ConfigError(
            f"{url!r} is no place for a store",
            kept="nothing was made",
            fix="name a folder, or s3://bucket/prefix, gs://bucket/prefix or az://container/prefix, with credentials "
            "in the environment",
        )
    return url.rstrip("/")


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except LANCE_ERRORS as error:
        raise ConfigError(
            f"the object store of {url} cannot be used: {error}",
            kept="the store is as it was",
            fix="set the credentials, region and endpoint in the environment, such as AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL (and AWS_ALLOW_HTTP=true for http)",
        ) from error
