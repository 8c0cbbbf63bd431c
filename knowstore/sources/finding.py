"""Paths, folders and patterns become the list of sources to read."""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from knowstore.records import SourceFailure

SUFFIXES = (
    ".txt", ".md", ".html", ".htm", ".pdf", ".docx", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One input.

    Args:
        name: the resolved absolute path with forward slashes, or `-` for stdin; it becomes the
            `source` of the passages, so that a later ingest of the same file finds them.
        path: the same as a path; None for stdin.
        shown: the link by which the file was found, where only that says what it is.
    """

    name: str
    path: Path | None
    shown: Path | None = None


def source_suffix(path: PurePath) -> str:
    """The suffix that says the format, lower case, looking through `.gz`: `.csv` of `a.csv.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def name_of(path: PurePath) -> str:
    """A path as text that can be stored: bytes of it that are not UTF-8 are written as `\\xff`."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def find_sources(paths: Sequence[str], without: Path | None = None) -> tuple[list[Source], list[SourceFailure]]:
    """List the sources behind paths, folders, patterns and `-` (stdin).

    A file that is named is listed whatever its suffix. Folders are searched in depth for files of
    a known suffix, each folder once however it is linked, hidden names left out; a pattern
    (`*`, `?`, `[...]`, `**` for any folders) is searched the same way.

    Args:
        paths: what a user typed; `~` is not expanded.
        without: a folder that is not searched, such as the store's own; a file in it can be named.

    Returns:
        The sources, each once, in the order of `paths` and sorted within one; and what could not
        be listed: missing paths, patterns and folders without a readable file, broken links.
    """
    sources: dict[str, Source] = {}
    failures: dict[SourceFailure, None] = {}
    for path in paths:
        found, failed = _expand(path, without)
        sources.update((source.name, source) for source in found if source.name not in sources)
        failures.update(dict.fromkeys(failed))
    return list(sources.values()), list(failures)


def _expand(path: str, without: Path | None) -> tuple[list[Source], list[SourceFailure]]:
    if path == "-":
        return [Source("-", None)], []
    if not path:
        return [], [SourceFailure(path, "the path is empty")]
    failures: list[SourceFailure] = []
    try:
        if os.path.isdir(path):
            found, nothing = (
                _walk(Path(path), failures, without),
                f"the folder has no file of a known suffix ({_known()})",
            )
        elif not os.path.lexists(path) and glob.has_magic(path):
            found, nothing = (
                _matching(path, failures, without),
                f"the pattern matches no file of a known suffix ({_known()})",
            )
        else:
            found, nothing = iter([Path(path)]), ""
        sources = [source for file in sorted(found) if (source := _source(file, failures))]
    except ValueError as error:
        return [], [SourceFailure(path, f"cannot be a path: {error}")]
    if not sources and not failures:
        failures.append(SourceFailure(name_of(PurePath(path)), nothing))
    return sources, failures


def _known() -> str:
    return f"{' '.join(SUFFIXES)}, each also with .gz"


def _source(file: Path, failures: list[SourceFailure]) -> Source | None:
    try:
        path = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        failures.append(SourceFailure(name_of(file), _why_unresolved(file, error)))
        return None
    is_told_by_link = source_suffix(path) not in SUFFIXES and source_suffix(file) in SUFFIXES
    return Source(name_of(path), path, file if is_told_by_link else None)


def _why_unresolved(file: Path, error: OSError | RuntimeError) -> str:
    if isinstance(error, RuntimeError) or error.errno == errno.ELOOP:  # RuntimeError before Python 3.13
        return "is a symbolic link that leads in a circle"
    if isinstance(error, FileNotFoundError):
        return "is a symbolic link that leads nowhere" if file.is_symlink() else "does not exist"
    return f"cannot be opened: {error.strerror}"


def _walk(folder: Path, failures: list[SourceFailure], without: Path | None) -> Iterator[Path]:
    """Files of a known suffix below a folder, each folder once, hidden names and all of `without` left out."""
    seen: set[tuple[int, int]] = set()
    if without is not None and without.exists():
        status = without.stat()
        seen.add((status.st_dev, status.st_ino))
    pending = [folder]
    while pending:
        current = pending.pop()
        try:
            status = current.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(current) as scan:
                entries = [entry for entry in scan if not entry.name.startswith(".")]
        except OSError as error:
            failures.append(SourceFailure(name_of(current), f"the folder cannot be listed: {error.strerror}"))
            continue
        for entry in entries:
            if _is_folder(entry):
                pending.append(Path(entry.path))
            elif source_suffix(PurePath(entry.name)) in SUFFIXES:
                yield Path(entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _matching(pattern: str, failures: list[SourceFailure], without: Path | None) -> Iterator[Path]:
    """Files of a known suffix that a pattern matches, below the folders it matches too.

    glob.glob follows linked folders without end for `**`, so that one is walked here.
    """
    if "**" not in Path(pattern).parts:
        for match in map(Path, glob.glob(pattern)):
            if match.is_dir():
                yield from _walk(match, failures, without)
            elif source_suffix(match) in SUFFIXES:
                yield match
        return
    parts = Path(pattern).parts
    n_plain = next(n for n, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:n_plain])
    if base.is_dir():
        for file in _walk(base, failures, without):
            if _matches(file.relative_to(base).parts, parts[n_plain:]):
                yield file


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
