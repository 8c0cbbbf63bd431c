"""What a small source may not grow to: things are counted before a parser builds its tree, many bytes for each."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from typing import TypeVar

from knowstore.sources.finding import Source
from knowstore.sources.opening import too_large, unreadable

MAX_JSON_VALUES = 10_000_000  # about 100 bytes each
MAX_HTML_TAGS = 2_000_000  # about 450 bytes each
MAX_WORD_TAGS = 4_000_000
MAX_MARKDOWN_MARKS = 2_000_000  # line ends and marks, up to 500 bytes each
MAX_PAGE_BYTES = 8 * 1024 * 1024  # of the drawing of a PDF's page, up to 100 bytes each
MAX_HTML_STEPS = 200_000_000  # of looking for what a tag ends, among all that are open
_MARKDOWN_MARKS = "\n*_`[]<&\\|>-+#"
_CHUNK_BYTES = 1 << 20
_HTML_CHUNK_BYTES = 1 << 10

_T = TypeVar("_T")


def check_json(text: str, source: Source) -> None:
    """Raise SourceError for more values than JSON may have that is read whole."""
    n_values = sum(map(text.count, "[{,"))
    if n_values > MAX_JSON_VALUES:
        fix = "write one object per line, with the suffix .jsonl: that is read a line at a time"
        raise unreadable(source, _more("values", n_values, MAX_JSON_VALUES), fix)


def check_html(text: str, source: Source) -> None:
    """Raise SourceError for more tags than an HTML file may have."""
    if (n_tags := text.count("<")) > MAX_HTML_TAGS:
        raise unreadable(source, _more("tags", n_tags, MAX_HTML_TAGS), "split it")


def check_html_nesting(text: str, source: Source) -> None:
    """Raise SourceError for so many end tags in so many open elements that reading them would take minutes.

    The parser looks for what a tag ends among all open elements, and through all of them for a tag that ends nothing.
    """
    from lxml import etree

    data, depth, n_steps = text.encode("utf-8", "replace"), _Depth(), 0
    parser = etree.HTMLParser(target=depth, encoding="utf-8")
    for at in range(0, len(data), _HTML_CHUNK_BYTES):
        n_ends = data.count(b"</", max(at - 1, 0), at + _HTML_CHUNK_BYTES)
        n_steps += n_ends * depth.n_open
        if n_steps > MAX_HTML_STEPS:
            raise unreadable(source, f"has too many end tags in {depth.n_open:,} open elements", "close its elements")
        parser.feed(data[at : at + _HTML_CHUNK_BYTES])


class _Depth:
    """A parser's target that counts open elements."""

    def __init__(self) -> None:
        self.n_open = 0

    def start(self, _tag: str, _attributes: object) -> None:
        self.n_open += 1

    def end(self, _tag: str) -> None:
        self.n_open -= 1


def check_markdown(text: str, source: Source) -> None:
    """Raise SourceError for more line ends and marks than a Markdown file may have."""
    if (n_marks := sum(map(text.count, _MARKDOWN_MARKS))) > MAX_MARKDOWN_MARKS:
        raise unreadable(source, _more("line ends and marks", n_marks, MAX_MARKDOWN_MARKS), "split it")


def check_word(archive: zipfile.ZipFile, source: Source, max_bytes: int) -> None:
    """Raise SourceError for a Word file of more than `max_bytes` uncompressed, or with more tags than it may have."""
    size = sum(entry.file_size for entry in archive.infolist())
    if size > max_bytes:
        raise too_large(source, f"holds {size:,} bytes uncompressed", max_bytes)
    n_tags = 0
    for entry in archive.infolist():
        with archive.open(entry) as member:
            while chunk := member.read(_CHUNK_BYTES):
                n_tags += chunk.count(b"<")
                if n_tags > MAX_WORD_TAGS:
                    raise unreadable(source, f"has more than {MAX_WORD_TAGS:,} tags", "split it")


def bounded(parts: Iterable[tuple[_T, str]], source: Source, max_bytes: int) -> Iterator[tuple[_T, str]]:
    """Parts with their texts, until these have more than `max_bytes` characters: a text can be told many times."""
    n_chars = 0
    for part, text in parts:
        n_chars += len(text)
        if n_chars > max_bytes:
            raise too_large(source, f"has a text of more than {max_bytes:,} characters", max_bytes)
        yield part, text


def _more(what: str, found: int, limit: int) -> str:
    return f"has {found:,} {what}, more than the limit of {limit:,}"
