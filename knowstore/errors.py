"""Every error that knowstore raises on purpose.

KnowledgeStoreError
├── ConfigError         a setting, path or reference that cannot work
│   └── ModelNotFoundError   a model reference that resolves to nothing
├── SourceError         an input file that cannot become passages
├── CatalogError        the SQL catalog: schema, lock, unknown batch
│   ├── StoreLockedError     another writer holds the store
│   ├── SchemaError          catalog written by another version
│   └── UnknownBatchError    no such edit batch
├── PassageError        passages table: unknown id, bad filter
│   ├── UnknownPassageError  no such live passage
│   └── FilterError          a filter that cannot be read
├── BankError           the expert bank
│   ├── ExpertShapeError     tensors of the wrong shape
│   ├── ExpertChecksumError  stored bytes that are not what was written
│   └── FingerprintError     experts made for another model or hypernetwork
├── RetrievalError      retriever, reranker and their indexes
├── MountError          experts that do not fit the model
├── EngineError         workers on other cores or machines that cannot be had, or keep dying
├── HypernetworkError   a hypernetwork that cannot be read, or was never trained
└── TrainingError       a training run that cannot start or go on
"""

from __future__ import annotations


class KnowledgeStoreError(Exception):
    """Base of every error raised on purpose: what happened, what was kept, what to do."""

    def __init__(self, what: str, kept: str, fix: str) -> None:
        super().__init__(what, kept, fix)
        self.what, self.kept, self.fix = what, kept, fix

    def __str__(self) -> str:
        return f"{self.what}\nKept: {self.kept}\nFix: {self.fix}"


class ConfigError(KnowledgeStoreError):
    """A setting, path or reference that cannot work."""


class ModelNotFoundError(ConfigError):
    """A model reference that resolves to no installed package, directory or hub id."""


class SourceError(KnowledgeStoreError):
    """An input file that cannot become passages."""


class CatalogError(KnowledgeStoreError):
    """The SQL catalog cannot do what was asked."""


class StoreLockedError(CatalogError):
    """Another writer holds the store."""


class SchemaError(CatalogError):
    """The catalog's schema is not the one this version of knowstore knows."""


class UnknownBatchError(CatalogError):
    """No edit batch has this id."""


class PassageError(KnowledgeStoreError):
    """The passages table cannot do what was asked."""


class UnknownPassageError(PassageError):
    """No live passage has this id."""


class FilterError(PassageError):
    """A filter that cannot be read."""


class BankError(KnowledgeStoreError):
    """The expert bank cannot do what was asked."""


class ExpertShapeError(BankError):
    """Expert tensors whose shapes do not fit together or the bank."""


class ExpertChecksumError(BankError):
    """Stored expert bytes that are not the bytes that were written."""


class FingerprintError(BankError):
    """Experts made for another base model, layer or hypernetwork."""


class RetrievalError(KnowledgeStoreError):
    """The retriever, the reranker or one of their indexes cannot do what was asked."""


class MountError(KnowledgeStoreError):
    """Experts that cannot be mounted on this model."""


class EngineError(KnowledgeStoreError):
    """Workers on other cores or machines that cannot be had, or keep dying."""


class HypernetworkError(KnowledgeStoreError):
    """A hypernetwork that cannot be read or was never trained."""


class TrainingError(KnowledgeStoreError):
    """A training run that cannot start or cannot go on."""
