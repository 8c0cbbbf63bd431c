"""`knowstore doctor`: what is installed, what resolves, what is wrong and how to mend it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import typer

from knowstore.errors import KnowledgeStoreError

from .database import CATALOG_FILE, open_catalog
from .models import listed, models_in_use, record
from .output import size
from .registration import app, command
from .session import Session

_REQUIRED = ("torch", "transformers", "lancedb", "sqlalchemy", "alembic", "safetensors", "gguf")
_EXTRAS = {
    "cpu or gpu": (("faiss-cpu", "faiss-gpu"), "the faiss index"),
    "rerank": (("FlagEmbedding",), "rerankers of the FlagEmbedding family"),
    "postgres": (("psycopg",), "a catalog in PostgreSQL"),
    "docs": (("pypdf", "python-docx", "beautifulsoup4"), "PDF, Word and HTML files"),
    "plots": (("matplotlib",), "pictures of benches and of training runs"),
    "baselines": (("peft",), "FT-LoRA of `knowstore bench methods`"),
    "peers": (
        ("langchain-core", "langchain-lancedb", "llama-index-core", "llama-index-vector-stores-lancedb"),
        "LangChain and LlamaIndex in `knowstore bench peers`",
    ),
    "ray": (("ray", "pylance"), "ingest, reexpert and answers on many cores or machines"),
}
_FREE_BYTES = 2_000_000_000


class Check(NamedTuple):
    """One thing looked at: `problem` stops knowstore from working, `note` is only good to know."""

    name: str
    state: Literal["ok", "note", "problem"]
    detail: str
    fix: str = ""


@command(app, example="knowstore doctor")
def doctor(session: Session) -> None:
    """Say what is installed, which models resolve, which device is used, what is wrong and how to mend it.

    Changes nothing; exits with 1 when something must be mended.
    """
    checks = [
        *_packages(),
        *_extras(),
        _device(session),
        *_models(session),
        *_relevance(session),
        *_disk(session),
        _store(session),
    ]
    is_ok = all(check.state != "problem" for check in checks)
    rows = [check._asdict() for check in checks]
    names = ["name", "state", "detail", "fix"]
    session.output.listing("checks", rows, names, id_column="name", ok=is_ok)
    if not is_ok:
        raise typer.Exit(1)


def _packages() -> Iterator[Check]:
    yield Check("knowstore", "ok", f"{_version('knowstore')}, Python {sys.version.split()[0]}")
    for name in _REQUIRED:
        found = _version(name)
        fix = "" if found else "pip install knowstore"
        yield Check(name, "ok" if found else "problem", found or "is not installed", fix)


def _extras() -> Iterator[Check]:
    for extra, (packages, purpose) in _EXTRAS.items():
        found = {name: installed for name in packages if (installed := _version(name))}
        if len(found) == 2 and extra == "cpu or gpu":
            fix = "pip uninstall faiss-cpu faiss-gpu, then install knowstore[cpu] or knowstore[gpu]"
            yield Check("faiss", "problem", "faiss-cpu and faiss-gpu are both installed and break each other", fix)
            continue
        is_whole = bool(found) if extra == "cpu or gpu" else len(found) == len(packages)
        detail = ", ".join(f"{name} {installed}" for name, installed in found.items())
        if is_whole:
            yield Check(f"extra {extra}", "ok", detail)
        else:
            fix = f"for {purpose}: pip install 'knowstore[{extra.split()[0]}]'"
            yield Check(f"extra {extra}", "note", detail or "is not installed", fix)


def _device(session: Session) -> Check:
    from knowstore.models import choose_device, choose_dtype

    try:
        config = session.model_config()
        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, device)
    except KnowledgeStoreError as error:
        return Check("device", "problem", error.what, error.fix)
    return Check("device", "ok", f"{device} in {str(dtype).removeprefix('torch.')}, {os.cpu_count()} CPU cores")


def _models(session: Session) -> Iterator[Check]:
    for row in map(record, listed(session)):
        if row["fix"]:
            yield Check(row["role"], "problem", row["state"], row["fix"])
        else:
            yield Check(row["role"], "ok", f"{row['name']}, {row['state']}, {row['path']}")


def _relevance(session: Session) -> Iterator[Check]:
    """What the reranker's scores mean: when nothing is mounted, and how sharp relevance is."""
    from knowstore.errors import ModelNotFoundError
    from knowstore.models import locate
    from knowstore.retrieval import calibration

    reference = models_in_use(session).reranker
    try:
        found = calibration(reference, locate(reference, "reranker").path)
    except ModelNotFoundError:
        return  # said among the models
    except KnowledgeStoreError as error:
        yield Check("relevance", "problem", error.what, error.fix)
        return
    threshold = found.null_threshold
    null = "there is no null option" if threshold is None else f"nothing is mounted under a score of {threshold:.2f}"
    of_each = f"of passages {found.passages:.2f}, of sentences {found.sentences:.2f}, of words {found.words:.2f}"
    yield Check("relevance", "ok", f"{null}, temperatures {of_each}")


def _disk(session: Session) -> Iterator[Check]:
    import platformdirs

    folders = {"cache": platformdirs.user_cache_path("knowstore")}
    if not session.is_remote:
        folders["store folder"] = session.folder
    for name, folder in folders.items():
        there = _nearest(folder.absolute())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Check(name, "problem", f"{folder} cannot be written", f"make {there} writable")
        elif free < _FREE_BYTES:
            yield Check(name, "note", f"{size(free)} free for {folder}", "free some disk space")
        else:
            yield Check(name, "ok", f"{folder}, {size(free)} free")


def _nearest(folder: Path) -> Path:
    """The folder, or the first above it that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _store(session: Session) -> Check:
    if session.catalog is None and (session.is_remote or not (session.folder / CATALOG_FILE).exists()):
        if session.is_remote:
            return Check("store", "problem", "its catalog is elsewhere and not named", "name it with --catalog URL")
        return Check("store", "note", f"there is none in {session.folder}", "make one with `knowstore ingest PATH`")
    try:
        with open_catalog(session) as catalog:
            current, head = catalog.schema_current(), catalog.schema_head()
            if current == head:
                return Check("store", "ok", f"{catalog.count_live():,} passages, schema {current}")
    except KnowledgeStoreError as error:
        return Check("store", "problem", error.what, error.fix)
    return Check("store", "note", f"schema {current or 'none'}, this version works with {head}", "knowstore db upgrade")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "" if importlib.util.find_spec(package.replace("-", "_").lower()) is None else "of unknown version"
