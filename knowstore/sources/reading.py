"""The one way from a source to its passages, whatever its format."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from knowstore.config import SplitConfig
from knowstore.records import Passage, SourceFailure
from knowstore.sources import documents, rows
from knowstore.sources.finding import Source
from knowstore.sources.opening import open_source, read_all, unreadable
from knowstore.sources.splitting import split_text

_MAX_LEADING_FAILURES = 100


def read_passages(
    source: Source,
    *,
    split: SplitConfig,
    columns: rows.ColumnMap | None,
    on_failure: Callable[[SourceFailure], None],
    stdin: BinaryIO | None = None,
) -> Iterator[Passage]:
    """Read the passages of one source, in order.

    CSV, TSV, JSON Lines and Parquet are streamed and may be larger than memory. `split.max_file_bytes`
    limits the other formats, and what any compressed file may grow to.

    Args:
        source: from `find_sources`; its name becomes the passages' `source`.
        split: how documents and long rows are cut.
        columns: which columns of a row are read; None finds the usual names.
        on_failure: told of each row or page that cannot be read, named `source:line`, `source#row`
            (from 1) or `source#pageN`; reading goes on after it.
        stdin: bytes of the source `-`, whose format is told by their beginning.

    Yields: passages; those of a source that turns out damaged later on have been yielded by then.

    Raises:
        SourceError: at the first `next` or later, when the source as a whole cannot be read or
            gives no passage; after 100 bad rows without a good one it is given up.
    """
    n_passages = n_failures = 0
    with open_source(source, split.max_file_bytes, stdin) as (suffix, stream):
        for item in _items(suffix, stream, source, split, columns or rows.ColumnMap()):
            if isinstance(item, SourceFailure):
                on_failure(item)
                n_failures += 1
                if not n_passages and n_failures == _MAX_LEADING_FAILURES:
                    reason = f"given up after {n_failures} bad rows without a good one, the last: {item.error}"
                    raise unreadable(source, reason, "check its format and which columns it has")
                continue
            for passage in split_text(
                item.text, title=item.title, source=source.name, date=item.date, words=split.words
            ):
                n_passages += 1
                yield passage
    if not n_passages:
        reason = f"gives no passage; {n_failures} bad rows or pages" if n_failures else "has no text"
        raise unreadable(source, reason, "mend it, or leave it out")


def _items(
    suffix: str, stream: io.BufferedReader, source: Source, split: SplitConfig, columns: rows.ColumnMap
) -> Iterable[rows.Item]:
    match suffix:
        case ".csv":
            return rows.read_csv(stream, source, columns, delimiter=None)
        case ".tsv":
            return rows.read_csv(stream, source, columns, delimiter="\t")
        case ".jsonl" | ".ndjson":
            return rows.read_jsonl(stream, source, columns)
        case ".parquet":
            return rows.read_parquet(stream, source, columns)
    data = read_all(stream, source, split.max_file_bytes)
    match suffix:
        case ".json":
            return rows.read_json(data, source, columns)
        case ".pdf":
            return documents.read_pdf(data, source, split.max_file_bytes)
        case ".docx":
            return [documents.read_docx(data, source, split.max_file_bytes)]
        case ".md":
            return [documents.read_markdown(data, source)]
        case ".html" | ".htm":
            return [documents.read_html(data, source)]
        case _:
            return [documents.read_txt(data, source)]
