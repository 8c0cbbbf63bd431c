"""The application with all its commands; importing a command's file registers it."""

from . import (
    ask,
    audit,
    bench,
    bench_layers,
    browse,
    database,
    doctor,
    edit,
    ingest,
    keep,
    models,
    probes,
    reexpert,
    train,
)
from .registration import app

__all__ = [
    "app",
    "ask",
    "audit",
    "bench",
    "bench_layers",
    "browse",
    "database",
    "doctor",
    "edit",
    "ingest",
    "keep",
    "models",
    "probes",
    "reexpert",
    "train",
]
