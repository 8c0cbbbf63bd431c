"""Bytes of a source: opened, decompressed, limited in size, refused when binary, decoded to text."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import PurePath
from typing import BinaryIO

from charset_normalizer import from_bytes

from knowstore.errors import SourceError
from knowstore.sources.finding import SUFFIXES, Source, source_suffix

_HEAD_BYTES = 1 << 20
_ENCODING_SAMPLE_BYTES = 1 << 18
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LEGACY_ENCODINGS = [
    "cp1252", "cp1250", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255", "cp1256",
    "shift_jis", "euc_jp", "gb18030", "big5", "euc_kr",
]  # fmt: skip
_BINARY_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
_FEW_CONTROLS = 8
_MAX_CONTROL_SHARE = 0.02
_CALLED_LATIN_1 = ("ascii", "us-ascii", "iso-8859-1", "latin-1", "latin1")  # browsers read these as cp1252
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_SAVE_AS_UTF8 = "save it as UTF-8 text"
_SUFFIX_OF_FORMAT = "give it the suffix of its format"


def unreadable(source: Source, reason: str, fix: str) -> SourceError:
    """The error of a source that cannot become passages; the caller adds the cause by `from`."""
    return SourceError(
        f"{source.name}: {reason}", kept="the file itself and every other source are as they were", fix=fix
    )


@contextmanager
def open_source(source: Source, max_bytes: int, stdin: BinaryIO | None) -> Iterator[tuple[str, io.BufferedReader]]:
    """Open a source for reading, decompressed, and say its format.

    Args:
        source: a file, or stdin, whose format is told by its first bytes.
        max_bytes: limit of what a compressed source may grow to.
        stdin: what to read for `-`.

    Yields: the suffix of its format, and its bytes with at least the first MiB to peek at.

    Raises:
        SourceError: not a regular file, no permission, an unknown suffix, an empty file, broken gzip
            data, or more than `max_bytes` of it.
    """
    with ExitStack() as stack:
        if source.path is None:
            if stdin is None:
                raise unreadable(source, "there is no standard input to read", "pipe data in, or name a file")
            stream = _buffered(stdin, source)
            suffix, is_gzip = "", stream.peek(2)[:2] == b"\x1f\x8b"
        else:
            shown = source.shown or source.path
            suffix, is_gzip = _known_suffix(shown, source), shown.suffix.lower() == ".gz"
            stream = _buffered(stack.enter_context(open_file(source)), source)
        if not stream.peek(1):
            raise unreadable(source, "the file is empty", "remove it from the list, or write it again")
        if is_gzip:
            stream = _buffered(stack.enter_context(gzip.GzipFile(fileobj=stream)), source, max_bytes)
            if not stream.peek(1):
                raise unreadable(source, "the compressed file is empty", "remove it from the list, or write it again")
        yield suffix or _suffix_of_content(stream.peek(1)), stream


def read_all(stream: io.BufferedReader, source: Source, max_bytes: int) -> bytes:
    """Read what is left of a source whose format needs all of it in memory.

    Raises:
        SourceError: there are more than `max_bytes`.
    """
    with suppress(FileNotFoundError):  # deleted since it was opened, and read to its end all the same
        if source.path is not None and (size := source.path.stat().st_size) > max_bytes:
            raise too_large(source, f"has {size:,} bytes", max_bytes)
    data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise too_large(source, f"has more than {max_bytes:,} bytes", max_bytes)
    return data


def decode(data: bytes, source: Source, declared: str | None = None) -> str:
    """Decode a whole text file.

    Raises:
        SourceError: binary data, UTF-8 with broken bytes, or an encoding that cannot be told.
    """
    encoding = encoding_of(data, source, declared)
    try:
        return data.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise unreadable(source, f"is not valid {encoding.upper()}: {error}", _SAVE_AS_UTF8) from error


def encoding_of(data: bytes, source: Source, declared: str | None = None, *, is_head: bool = False) -> str:
    """Tell the encoding of a text: its byte order mark, UTF-8, `declared`, or a guess, in this order.

    Args:
        data: the text.
        is_head: `data` is the beginning of a text that is decoded line by line, where a broken line
            is reported alone: UTF-8 with a few broken bytes and single NUL bytes are let through.

    Raises:
        SourceError: binary data, UTF-8 with broken bytes, or an encoding that cannot be told.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return encoding
    if not is_head and (position := data.find(b"\0")) >= 0:
        raise unreadable(source, f"is binary, not text: NUL byte at byte {position:,}", _SUFFIX_OF_FORMAT)
    sample = data[:_HEAD_BYTES]
    n_controls = len(sample) - len(sample.translate(None, _BINARY_CONTROLS))
    if n_controls > _FEW_CONTROLS + _MAX_CONTROL_SHARE * len(sample):
        raise unreadable(source, f"is binary, not text: {n_controls:,} control bytes", _SUFFIX_OF_FORMAT)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, final=not is_head)
    except UnicodeDecodeError as error:
        if declared is not None:
            return "cp1252" if declared.lower() in _CALLED_LATIN_1 else declared
        window = data[max(0, error.start - _ENCODING_SAMPLE_BYTES // 2) :][:_ENCODING_SAMPLE_BYTES]
        if not _is_mostly_utf8(window):
            return _guessed_encoding(window, source, error)
        if not is_head:
            what = f"is UTF-8 with broken bytes, the first at byte {error.start:,}"
            raise unreadable(source, what, _SAVE_AS_UTF8) from error
    return "utf-8"


def _is_mostly_utf8(window: bytes) -> bool:
    replaced = window.decode("utf-8", "replace")
    n_broken = replaced.count("\ufffd")
    return len(_NOT_ASCII.findall(replaced)) > 2 * n_broken


def _guessed_encoding(window: bytes, source: Source, error: UnicodeDecodeError) -> str:
    matches = list(from_bytes(window, cp_isolation=_LEGACY_ENCODINGS))
    if not matches:
        raise unreadable(source, "has an encoding that cannot be told", _SAVE_AS_UTF8) from error
    best = [m.encoding for m in matches if (m.chaos, m.coherence) == (matches[0].chaos, matches[0].coherence)]
    return min(best, key=_LEGACY_ENCODINGS.index)


def _known_suffix(path: PurePath, source: Source) -> str:
    suffix = source_suffix(path)
    if suffix not in SUFFIXES:
        found = f"the suffix {suffix!r} is not known" if suffix else "has no suffix that says its format"
        raise unreadable(source, found, f"use one of {' '.join(SUFFIXES)}, each also with .gz")
    return suffix


def _suffix_of_content(head: bytes) -> str:
    for magic, suffix in ((b"%PDF-", ".pdf"), (b"PK\x03\x04", ".docx"), (b"PAR1", ".parquet")):
        if head.startswith(magic):
            return suffix
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        return ".json"
    if start.startswith(b"{"):
        first_line, _, others = start.partition(b"\n")
        return ".jsonl" if others.strip() and first_line.rstrip().endswith(b"}") else ".json"
    return ".html" if start[:9].lower().startswith((b"<!doctype", b"<html")) else ".txt"


def open_file(source: Source) -> BinaryIO:
    """The file of a source.

    Raises:
        SourceError: it is not there (any more), may not be read, or is no regular file.
    """
    assert source.path is not None
    try:
        mode = source.path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise unreadable(source, f"is {_kind(mode)}, not a regular file", "name a file, or pipe the data into `-`")
        return source.path.open("rb")
    except PermissionError as error:
        raise unreadable(source, "permission denied", "make the file readable for this user") from error
    except FileNotFoundError as error:
        raise unreadable(source, "does not exist", "check the path") from error
    except OSError as error:
        raise unreadable(source, f"cannot be opened: {error.strerror}", "check the path and the disk") from error


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a pipe (fifo)"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def too_large(source: Source, found: str, max_bytes: int) -> SourceError:
    """The error of a source of more than the configured size."""
    return unreadable(
        source, f"{found}, more than the limit of {max_bytes:,}", "split it, or raise max_file_bytes in SplitConfig"
    )


def _buffered(inner: BinaryIO | gzip.GzipFile, source: Source, max_bytes: int | None = None) -> io.BufferedReader:
    return io.BufferedReader(_Checked(inner, source, max_bytes), buffer_size=_HEAD_BYTES)


class _Checked(io.RawIOBase):
    """Reads on from another stream, counts its bytes, and turns what goes wrong into SourceError."""

    def __init__(self, inner: BinaryIO | gzip.GzipFile, source: Source, max_bytes: int | None) -> None:
        self._inner, self._source, self._max_bytes = inner, source, max_bytes
        self._n_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        try:
            data = self._inner.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise unreadable(
                self._source, f"is not sound gzip data: {error}", "compress it again, or fetch it again"
            ) from error
        except OSError as error:
            raise unreadable(
                self._source, f"cannot be read: {error.strerror or error}", "check the disk it is on"
            ) from error
        self._n_bytes += len(data)
        if self._max_bytes is not None and self._n_bytes > self._max_bytes:
            raise too_large(self._source, f"holds more than {self._max_bytes:,} bytes uncompressed", self._max_bytes)
        buffer[: len(data)] = data
        return len(data)
