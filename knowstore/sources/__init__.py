"""Files become passages: finding them, reading each format, cutting at sentence ends."""

from knowstore.sources.dates import iso_date
from knowstore.sources.finding import Source, find_sources
from knowstore.sources.pages import leaf_columns, read_batches
from knowstore.sources.reading import read_passages
from knowstore.sources.rows import ColumnMap
from knowstore.sources.sentences import sentence_spans
from knowstore.sources.splitting import split_text

__all__ = [
    "ColumnMap",
    "Source",
    "find_sources",
    "iso_date",
    "leaf_columns",
    "read_batches",
    "read_passages",
    "sentence_spans",
    "split_text",
]
