"""Searches over passages that are in no store: for hard negatives, which are what a reranker will have to order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from knowstore._encoding import embedded_rows
from knowstore._loaded import OnProgress
from knowstore.passages import PassageTable
from knowstore.records import Passage

if TYPE_CHECKING:
    from knowstore.retrieval import Retriever

_N_FOUND = 10  # of each search
_ROWS = 1_024  # encoded and written at once
TABLE_BATCH = 1
"""The edit batch that the rows of a `passages_table` belong to."""


@contextmanager
def passages_table(
    retriever: Retriever, passages: Sequence[Passage], on_progress: OnProgress | None = None
) -> Iterator[PassageTable]:
    """A table of passages that are in no store, each with its sentences, in a folder that goes away with the block."""
    with TemporaryDirectory(prefix="knowstore-passages-", ignore_cleanup_errors=True) as folder:
        table = PassageTable.open(folder, dim=retriever.dim, create=True)
        for first in range(0, len(passages), _ROWS):
            part = passages[first : first + _ROWS]
            table.add(embedded_rows(retriever, part), TABLE_BATCH)
            if on_progress is not None:
                on_progress("encoding passages", first + len(part), len(passages))
        table.optimize()
        yield table


@contextmanager
def passage_search(
    retriever: Retriever, texts: Sequence[tuple[str, str]], on_progress: OnProgress | None = None
) -> Iterator[Callable[[str], list[int]]]:
    """A search over passages that are in no store, for the hard negatives of a reranker.

    Args:
        retriever: encodes every passage once, and each question.
        texts: title and text of N passages.

    Yields: a function from a question to indices of `texts`: the best by BM25 and by inner product (Eq. 7), one of
        each in turn. Of passages that are equal but for blanks, the first is found.
    """
    passages = [Passage(text, title) for title, text in texts]
    first: dict[str, int] = {}
    for index, passage in enumerate(passages):
        first.setdefault(passage.passage_id, index)
    with passages_table(retriever, [passages[index] for index in first.values()], on_progress) as table:

        def search(question: str) -> list[int]:
            vector = retriever.encode_questions([question])[0]
            by_text = table.search_text(question, _N_FOUND, at=None)
            by_vector = table.search_vector(vector, _N_FOUND, at=None)
            in_turn = chain.from_iterable(zip_longest(by_text, by_vector))
            return list(dict.fromkeys(first[found.id] for found in in_turn if found is not None))

        yield search
