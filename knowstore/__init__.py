"""knowstore: a continual knowledge store for frozen language models. Public names, loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from knowstore.catalog import Catalog
    from knowstore.config import (
        BankConfig,
        Filters,
        GenerationConfig,
        ModelConfig,
        RayConfig,
        RetrievalConfig,
        SplitConfig,
    )
    from knowstore.errors import KnowledgeStoreError
    from knowstore.records import Answer, EditBatch, Hit, IngestReport, MountedExpert, Passage, Stats, VerifyReport
    from knowstore.sources import ColumnMap
    from knowstore.store import IngestPlan, KnowledgeStore, PassageDetail

__version__ = "0.1.0"

_HOMES = {
    "Answer": "records",
    "BankConfig": "config",
    "Catalog": "catalog",
    "ColumnMap": "sources",
    "EditBatch": "records",
    "Filters": "config",
    "GenerationConfig": "config",
    "Hit": "records",
    "IngestPlan": "store",
    "IngestReport": "records",
    "KnowledgeStore": "store",
    "KnowledgeStoreError": "errors",
    "ModelConfig": "config",
    "MountedExpert": "records",
    "Passage": "records",
    "PassageDetail": "store",
    "RayConfig": "config",
    "RetrievalConfig": "config",
    "SplitConfig": "config",
    "Stats": "records",
    "VerifyReport": "records",
}

__all__ = [
    "Answer",
    "BankConfig",
    "Catalog",
    "ColumnMap",
    "EditBatch",
    "Filters",
    "GenerationConfig",
    "Hit",
    "IngestPlan",
    "IngestReport",
    "KnowledgeStore",
    "KnowledgeStoreError",
    "ModelConfig",
    "MountedExpert",
    "Passage",
    "PassageDetail",
    "RayConfig",
    "RetrievalConfig",
    "SplitConfig",
    "Stats",
    "VerifyReport",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
