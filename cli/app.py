"""The application with all its commands; importing a command's file registers it."""

from . import ask, bench, browse, database, doctor, edit, ingest, keep, models, reexpert, train
from .registration import app

__all__ = [
    "app",
    "ask",
    "bench",
    "browse",
    "database",
    "doctor",
    "edit",
    "ingest",
    "keep",
    "models",
    "reexpert",
    "train",
]
