"""The catalog: which passages are live, since which edit batch, and from which source."""

from knowstore.catalog.catalog import Catalog
from knowstore.catalog.placements import Change
from knowstore.catalog.soundness import CatalogFault

__all__ = ["Catalog", "CatalogFault", "Change"]
