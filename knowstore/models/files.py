"""The user's cache directory and what is written there: whole or not at all, by one process at a time."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock

from knowstore.errors import ConfigError

CONVERSION_MARKER = "knowstore-conversion.json"


@dataclass(frozen=True)
class ConversionMarker:
    """What a directory was converted from, and the size of every file that the conversion wrote."""

    gguf: str
    gguf_sha256: str
    sizes: dict[str, int]


def default_cache_dir() -> Path:
    """`knowstore` in the user's cache directory."""
    return platformdirs.user_cache_path("knowstore")


def read_marker(folder: Path) -> ConversionMarker | None:
    """The marker of a complete conversion; None when there is none or a file is missing or cut short."""
    try:
        marker = ConversionMarker(**json.loads((folder / CONVERSION_MARKER).read_text(encoding="utf-8")))
        is_complete = all((folder / name).stat().st_size == size for name, size in marker.sizes.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return marker if is_complete else None


def write_marker(folder: Path, gguf: str, gguf_sha256: str) -> None:
    """Record that `folder` now holds everything; called last."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and file.name != CONVERSION_MARKER)
    sizes = {file.name: file.stat().st_size for file in files}
    text = json.dumps(asdict(ConversionMarker(gguf, gguf_sha256, sizes)), indent=1)
    (folder / CONVERSION_MARKER).write_text(text, encoding="utf-8")


def write_atomically(path: Path, text: str) -> None:
    """Write a small file under its name in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise


@contextmanager
def making_directory(target: Path, is_complete: Callable[[], bool]) -> Iterator[Path | None]:
    """Hold the lock on `target` and yield an empty directory that becomes it when the block ends well.

    Yields None when `is_complete` by then, because another process made `target` while this one waited.
    A block that fails leaves nothing behind; an incomplete directory at `target` is replaced.
    """
    with cache_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):
            if is_complete():
                yield None
                return
            for leftover in target.parent.glob(f".{glob.escape(target.name)}-*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
                made = Path(temporary) / target.name
                made.mkdir()
                yield made
                shutil.rmtree(target, ignore_errors=True)
                made.rename(target)


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Turn a cache that cannot be written into an error that says where it is."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the cache directory {folder} cannot be written: {error}",
            kept="what the cache held before",
            fix="make the directory writable and free space there, or set XDG_CACHE_HOME to another",
        ) from error
