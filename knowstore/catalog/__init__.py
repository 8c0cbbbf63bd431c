"""The catalog: which passages are live, since which edit batch and from which source, and what audits found."""

from knowstore.catalog.audits import AuditLog, Score
from knowstore.catalog.catalog import Catalog
from knowstore.catalog.lock import file_lock
from knowstore.catalog.placements import Change
from knowstore.catalog.soundness import CatalogFault

__all__ = ["AuditLog", "Catalog", "CatalogFault", "Change", "Score", "file_lock"]
