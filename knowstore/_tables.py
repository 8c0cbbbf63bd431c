"""The passages and the expert bank of a store: as they are now for writing, and at one state for reading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from knowstore._layout import Layout
from knowstore.bank import NAME, ExpertBank, bank_names
from knowstore.catalog import Catalog
from knowstore.errors import BankError, CatalogError, FilterError, PassageError, UnknownPassageError
from knowstore.passages import PassageTable

_T = TypeVar("_T")
_C = TypeVar("_C")


@dataclass(frozen=True)
class State:
    """What a reader sees: the latest committed edit batch, the fingerprints of what made the experts, and both tables,
    fixed; None while there are none."""

    head: int
    recorded: object
    tables: tuple[PassageTable, ExpertBank] | None

    @property
    def versions(self) -> tuple[object, ...]:
        """What changes with everything that is written."""
        tables = self.tables
        return (self.head, self.recorded, *(() if tables is None else (tables[0].version, tables[1].version)))


class Tables:
    """The tables of one open store. Which bank is in use follows from the fingerprints that the catalog records."""

    def __init__(self, layout: Layout, catalog: Catalog, cache_bytes: int) -> None:
        self._layout, self._catalog, self._cache_bytes = layout, catalog, cache_bytes
        self._passages: PassageTable | None = None
        self._bank: ExpertBank | None = None
        self._shown: tuple[PassageTable, ExpertBank] | None = None

    @property
    def are_there(self) -> bool:
        """Whether there are tables to be read; after the first edit batch they are missed when they are not there."""
        return self._catalog.head() > 0 or self._layout.has_tables

    def make(self, dim: int) -> None:
        """Begin both tables, in the place of what a crash may have left of such a beginning.

        Args:
            dim: width of the passages' vectors.

        Raises:
            CatalogError: there are passages, though the catalog has no edit batch, or what a crash left cannot be
                deleted; nothing was changed.
        """
        if self.are_there and self.passages().count(None):
            raise CatalogError(
                f"the catalog has no edit batch, the tables in {self._layout.location} hold passages: it is an older "
                "one",
                kept="both are as they were",
                fix="restore the catalog from a later backup, or ingest again into a new store",
            )
        self._layout.discard_tables()
        self._passages = self._bank = self._shown = None
        uri = str(self._layout.tables)
        PassageTable.open(uri, dim=dim, create=True)
        ExpertBank.open(uri, fingerprint=None, create=True)

    # as they are now

    def passages(self) -> PassageTable:
        """The passages as they are now; ask the catalog first what to expect in them."""
        if self._passages is None:
            self._passages = PassageTable.open(str(self._layout.tables))
        else:
            self._passages.refresh()
        return self._passages

    def bank(self) -> ExpertBank:
        """The bank in use as it is now."""
        recorded = self._catalog.setting("fingerprints")
        if self._bank is None or not _goes_with(self._bank, recorded):
            self._bank = self._opened(recorded)
        else:
            self._bank.refresh()
        return self._bank

    def both(self) -> tuple[PassageTable | None, ExpertBank | None]:
        """Both as they are now, or None and None."""
        return (self.passages(), self.bank()) if self.are_there else (None, None)

    def banks(self) -> list[ExpertBank]:
        """All banks: the one in use, the previous one, and one that is being made."""
        uri = str(self._layout.tables)
        return [ExpertBank.open(uri, fingerprint=None, name=name) for name in bank_names(uri)]

    def remade_bank(self) -> ExpertBank:
        """An empty bank in the place of the one in use, which cannot be opened."""
        recorded = self._catalog.setting("fingerprints")
        self._bank = self._shown = None
        return ExpertBank.remake(str(self._layout.tables), fingerprint=_fingerprint(recorded), name=bank_name(recorded))

    # at one state

    def in_one_state(self, read: Callable[[State, _C], _T], look: Callable[[], _C]) -> _T:
        """What `read` makes of a state and of what `look` finds in the catalog then; it is read again when a purge has
        meanwhile deleted files of this state, or another process has put a bank in the place of this one."""
        failed: tuple[object, ...] | None = None
        while True:
            state, found = self.state(look)
            try:
                return read(state, found)
            except (UnknownPassageError, FilterError):  # of what was asked, not of the files
                raise
            except (PassageError, BankError):
                if state.versions == failed:
                    raise
                failed, self._shown = state.versions, None

    def state(self, look: Callable[[], _C]) -> tuple[State, _C]:
        """The latest edit batch, the tables with it, and what `look` finds in the catalog, all of the same time."""
        failed: object = ()
        while True:
            head, recorded = self._catalog.head(), self._catalog.setting("fingerprints")
            try:
                state, found = State(head, recorded, self._latest(recorded)), look()
            except (PassageError, BankError):  # maybe of a bank that is being dropped or made anew
                if recorded == failed:
                    raise
                failed, self._shown = recorded, None
                continue
            if (self._catalog.head(), self._catalog.setting("fingerprints")) == (head, recorded):
                return state, found

    def forget(self) -> None:
        """Drop the decoded experts that reading keeps in memory."""
        if self._shown is not None:
            self._shown[1].forget()

    def _latest(self, recorded: object) -> tuple[PassageTable, ExpertBank] | None:
        if not self.are_there:
            return None
        table, bank = self._shown or (PassageTable.open(str(self._layout.tables)), self._opened(recorded))
        if not _goes_with(bank, recorded):
            bank = self._opened(recorded)
        self._shown = table.latest(), bank.latest()
        return self._shown

    def _opened(self, recorded: object) -> ExpertBank:
        return ExpertBank.open(
            str(self._layout.tables), fingerprint=_fingerprint(recorded), name=bank_name(recorded),
            cache_bytes=self._cache_bytes,
        )  # fmt: skip


def bank_name(recorded: object) -> str:
    """The bank that goes with the store's recorded fingerprints."""
    return str(recorded.get("bank", NAME)) if isinstance(recorded, dict) else NAME


def _fingerprint(recorded: object) -> str | None:
    return str(recorded["experts"]) if isinstance(recorded, dict) else None


def _goes_with(bank: ExpertBank, recorded: object) -> bool:
    return (bank.name, bank.fingerprint) == (bank_name(recorded), _fingerprint(recorded))
