"""The catalog: which passages are live, since which edit batch, and from which source."""

from knowstore.catalog.catalog import Catalog
from knowstore.catalog.lock import file_lock
from knowstore.catalog.placements import Change

__all__ = ["Catalog", "Change", "file_lock"]
