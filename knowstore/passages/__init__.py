"""The passages table: texts, their vectors and from which edit batch to which they are visible."""

from knowstore.passages.faiss_index import FaissIndex
from knowstore.passages.filters import PlacedFilters
from knowstore.passages.rows import LIVE, Candidate, PassageRow, StoredRow
from knowstore.passages.soundness import ExaminedRow, mended_date, mended_text
from knowstore.passages.table import PassageTable

__all__ = [
    "LIVE",
    "Candidate",
    "ExaminedRow",
    "FaissIndex",
    "PassageRow",
    "PassageTable",
    "PlacedFilters",
    "StoredRow",
    "mended_date",
    "mended_text",
]
