"""Where a store's files are: `store.json`, `catalog.sqlite` (unless the catalog is elsewhere) and `tables/`."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

from knowstore.catalog import Catalog
from knowstore.errors import CatalogError, ConfigError

_FORMAT = 1


@dataclass(frozen=True)
class Layout:
    """The folder of a store; `store_id` ties it to its catalog, wherever that is."""

    folder: Path
    store_id: str
    has_own_catalog: bool

    @classmethod
    def open(cls, folder: Path, *, create: bool, catalog_url: str | None) -> Layout:
        """Read the folder's `store.json`, or begin a new store.

        Raises:
            ConfigError: no store there and `create` is False, files that are not a store's, or a catalog URL
                for a store that has its own catalog (or none for one that has not).
        """
        described = folder / "store.json"
        if described.exists():
            try:
                raw = json.loads(described.read_text("utf-8"))
                layout = cls(folder, str(raw["store_id"]), bool(raw["has_own_catalog"]))
                newer = int(raw["format"]) > _FORMAT
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
            raw = {"format": _FORMAT, "store_id": layout.store_id, "has_own_catalog": layout.has_own_catalog}
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

    @property
    def catalog_path(self) -> Path:
        return self.folder / "catalog.sqlite"

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

    def check_catalog(self, catalog: Catalog) -> None:
        """Refuse a catalog that belongs to another store.

        Raises:
            CatalogError: it records another store's id, or is empty beside tables that are not.
        """
        found = catalog.setting("store_id")
        if found is None and self.has_tables:
            raise CatalogError(
                f"the catalog is empty, the tables in {self.folder} are not: it was lost, or is another one",
                kept="both are as they were",
                fix="restore the catalog from a backup, or name the one that this store was made with",
            )
        if found is None:
            catalog.set_setting("store_id", self.store_id)
        elif found != self.store_id:
            raise CatalogError(
                f"the catalog belongs to another store than the one in {self.folder}",
                kept="both are as they were",
                fix="name the catalog that this store was made with",
            )

    def size_bytes(self) -> dict[str, int]:
        """Bytes on disk: `passages`, `experts`, `catalog`, and `total`."""
        sizes = {name: self.table_bytes(f"{name}*") for name in ("passages", "experts")}
        sizes["catalog"] = sum(file.stat().st_size for file in self.folder.glob("catalog.sqlite*"))
        return sizes | {"total": sum(sizes.values())}

    def table_bytes(self, name: str) -> int:
        """Bytes on disk of a table; with `*` in the name, of all that match."""
        files = (file for folder in self.tables.glob(f"{name}.lance") for file in folder.rglob("*"))
        return sum(file.stat().st_size for file in files if file.is_file())


def _is_unfinished(path: Path) -> bool:
    """Whether a file is what a process leaves that was killed while it began a store, or is just beginning one."""
    return re.fullmatch(r"store\.json\.[0-9a-f]{32}", path.name) is not None
