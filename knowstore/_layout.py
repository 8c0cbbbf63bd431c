"""Where a store's files are: `store.json`, `catalog.sqlite` (unless the catalog is elsewhere) and `tables/`."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from knowstore.catalog import Catalog, file_lock
from knowstore.errors import BankError, CatalogError, ConfigError

FORMAT = 1
_DESCRIPTION = "store.json"
_NOT_IN_PATHS = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # LanceDB takes none of them; bytes become surrogates


class Layout(Protocol):
    """Where a store is: in a folder, or in a bucket of an object store (`_bucket`)."""

    @property
    def location(self) -> str:
        """As it is told to people."""
        ...

    @property
    def store_id(self) -> str:
        """What ties the store to its catalog, wherever that is."""
        ...

    @property
    def own_catalog(self) -> Path | None:
        """The catalog that is a part of the store, if it has one."""
        ...

    @property
    def tables(self) -> Path | str:
        """What LanceDB connects to."""
        ...

    @property
    def has_tables(self) -> bool:
        """Whether passages and a bank are there, to be read; they come with the first batch."""
        ...

    def lock(self) -> AbstractContextManager[None]:
        """Keeps other writers from the tables also when the connection drops that holds the catalog's lock."""
        ...

    def discard_tables(self) -> None:
        """Delete what a crash left of a first batch's tables; a kill within leaves none to be read, or all.

        Raises:
            CatalogError: they cannot be deleted.
        """
        ...

    def drop_bank(self, name: str) -> None:
        """Delete a bank that is not in use.

        Raises:
            BankError: it cannot be deleted; every other bank is as it was.
        """
        ...

    def sweep(self) -> None:
        """Delete what a crash left of tables that were being deleted, of banks that were just being made, and of files
        that were being written. Nobody else may be writing."""
        ...

    def size_bytes(self) -> dict[str, int]:
        """Bytes of `passages`, `experts`, `catalog`, and `total`."""
        ...

    def table_bytes(self, name: str) -> int:
        """Bytes of a table; with `*` in the name, of all that match."""
        ...


def check_catalog(layout: Layout, catalog: Catalog) -> None:
    """Refuse a catalog that belongs to another store.

    Raises:
        CatalogError: it records another store's id, or is empty beside tables that are not.
    """
    found = catalog.setting("store_id")
    if found is None and layout.has_tables:
        raise CatalogError(
            f"the catalog is empty, the tables in {layout.location} are not: it was lost, or is another one",
            kept="both are as they were",
            fix="restore the catalog from a backup, or name the one that this store was made with",
        )
    if found is None:
        found = catalog.settle("store_id", layout.store_id)
    if found != layout.store_id:
        raise CatalogError(
            f"the catalog belongs to another store than the one in {layout.location}",
            kept="both are as they were",
            fix="name the catalog that this store was made with",
        )


@dataclass(frozen=True)
class Folder:
    """A store in a folder."""

    folder: Path
    store_id: str
    has_own_catalog: bool

    @classmethod
    def open(cls, folder: Path, *, create: bool, catalog_url: str | None) -> Folder:
        """Read the folder's `store.json`, or begin a new store.

        Raises:
            ConfigError: no store there and `create` is False, files that are not a store's, a path that tables
                cannot have, or a catalog URL for a store that has its own catalog (or none for one that has not).
        """
        folder = _absolute(folder)
        described = folder / _DESCRIPTION
        if described.exists():
            try:
                raw = json.loads(described.read_text("utf-8"))
                layout = cls(folder, str(raw["store_id"]), bool(raw["has_own_catalog"]))
                newer = int(raw["format"]) > FORMAT
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{described} cannot be read: {error}",
                    kept="the folder is as it was",
                    fix="restore the file from a backup",
                ) from error
            if newer:
                raise ConfigError(
                    f"the store in {folder} was written by a newer version of knowstore",
                    kept="the store is as it was",
                    fix="upgrade knowstore",
                )
            if layout.has_own_catalog != (catalog_url is None):
                where = "in its folder" if layout.has_own_catalog else "in another database"
                raise ConfigError(
                    f"the store in {folder} has its catalog {where}",
                    kept="the store is as it was",
                    fix="leave out --catalog" if layout.has_own_catalog else "name that database with --catalog URL",
                )
            return layout
        if not create:
            raise ConfigError(
                f"there is no store in {folder}",
                kept="nothing was made",
                fix="name the folder of a store with --store, or begin one: `knowstore ingest PATH`",
            )
        if folder.exists() and (not folder.is_dir() or any(not _is_unfinished(path) for path in folder.iterdir())):
            raise ConfigError(
                f"{folder} exists and is no store",
                kept="it is as it was",
                fix="name another folder for the store",
            )
        layout = cls(folder, uuid.uuid4().hex, catalog_url is None)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            raw = {"format": FORMAT, "store_id": layout.store_id, "has_own_catalog": layout.has_own_catalog}
            new = folder / f"{described.name}.{layout.store_id}"
            new.write_text(json.dumps(raw) + "\n", "utf-8")
            try:
                described.hardlink_to(new)  # fails when another process was first
            except FileExistsError:
                return cls.open(folder, create=False, catalog_url=catalog_url)
            finally:
                new.unlink()
        except OSError as error:
            raise ConfigError(
                f"no store can be made in {folder}: {error}",
                kept="nothing was made",
                fix="name a folder that can be written",
            ) from error
        return layout

    @staticmethod
    def is_at(folder: Path) -> bool:
        """Whether there is a store."""
        return (folder / _DESCRIPTION).exists()

    @property
    def location(self) -> str:
        """See `Layout`."""
        return str(self.folder)

    @property
    def catalog_path(self) -> Path:
        return self.folder / "catalog.sqlite"

    @property
    def own_catalog(self) -> Path | None:
        """See `Layout`."""
        return self.catalog_path if self.has_own_catalog else None

    @property
    def tables(self) -> Path:
        return self.folder / "tables"

    @property
    def discarded(self) -> Path:
        """Where tables are moved that are to be deleted."""
        return self.folder / "tables.discarded"

    @property
    def has_tables(self) -> bool:
        """Whether passages and a bank are there, each with a version to be read; they come with the first batch."""
        return all(any(self.tables.glob(f"{name}.lance/_versions/*.manifest")) for name in ("passages", "experts*"))

    def lock(self) -> AbstractContextManager[None]:
        """See `Layout`."""
        return nullcontext() if self.has_own_catalog else file_lock(self.tables)

    def discard_tables(self) -> None:
        """See `Layout`."""
        self.sweep()
        if not self.tables.exists():
            return
        try:
            self.tables.rename(self.discarded)
        except OSError as error:
            raise CatalogError(
                f"the tables of a batch that was never committed cannot be deleted: {error}",
                kept="the store is empty, as it was",
                fix=f"make {self.folder} a folder that can be written",
            ) from error
        self.sweep()

    def drop_bank(self, name: str) -> None:
        """See `Layout`; a kill leaves all of it or none."""
        folder = f"{name}.lance"
        try:
            self.discarded.mkdir(exist_ok=True)
            (self.tables / folder).rename(self.discarded / folder)
        except OSError as error:
            raise BankError(
                f"the expert bank {name} in {self.tables} cannot be deleted: {error}",
                kept="its files, and every other bank",
                fix="look for missing permissions and run the command again",
            ) from error
        self.sweep()

    def sweep(self) -> None:
        """See `Layout`."""
        shutil.rmtree(self.discarded, ignore_errors=True)
        for folder in self.tables.glob("experts_*.lance"):
            if not any(folder.glob("_versions/*.manifest")) and not any(folder.glob("data/*")):
                shutil.rmtree(folder, ignore_errors=True)
        for file in self.tables.rglob(".tmp*"):  # as LanceDB names a file until it is whole; a full disk leaves it
            with suppress(OSError):
                file.unlink()

    def size_bytes(self) -> dict[str, int]:
        """Bytes on disk: `passages`, `experts`, `catalog`, and `total`."""
        sizes = {name: self.table_bytes(f"{name}*") for name in ("passages", "experts")}
        sizes["catalog"] = sum(map(_size, self.folder.glob("catalog.sqlite*")))
        return sizes | {"total": sum(sizes.values())}

    def table_bytes(self, name: str) -> int:
        """Bytes on disk of a table; with `*` in the name, of all that match."""
        folders = (found for table in self.tables.glob(f"{name}.lance") for found in os.walk(table))
        return sum(_size(Path(folder, file)) for folder, _, files in folders for file in files)


def _size(file: Path) -> int:
    """Bytes of a file, none where a writer has just deleted it."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _absolute(folder: Path) -> Path:
    """The path by which LanceDB, too, finds this folder: it takes `~` for the user's home, `name:` for the scheme of a
    URL and `..` for the parent by name, and a program may change its working directory.

    Raises:
        ConfigError: the path holds control characters, or bytes that are not UTF-8.
    """
    path = folder.resolve()
    if _NOT_IN_PATHS.search(str(path)):
        raise ConfigError(
            f"the path {str(path)!a} holds control characters, or bytes that are not UTF-8",
            kept="nothing was made",
            fix="name another folder for the store",
        )
    return path


def _is_unfinished(path: Path) -> bool:
    """Whether a file is what a process leaves that was killed while it began a store, or is just beginning one."""
    return re.fullmatch(r"store\.json\.[0-9a-f]{32}", path.name) is not None
