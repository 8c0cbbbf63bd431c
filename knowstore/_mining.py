"""Hard negatives for training: what the store's own searches find, which is what a reranker will have to order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from knowstore.passages import PassageRow, PassageTable
from knowstore.records import Passage

if TYPE_CHECKING:
    from knowstore.retrieval import Retriever

_N_FOUND = 10  # of each search
_ROWS = 4_096  # written at once
_BATCH = 1


@contextmanager
def passage_search(retriever: Retriever, texts: Sequence[tuple[str, str]]) -> Iterator[Callable[[str], list[int]]]:
    """A search over passages that are in no store: a passages table in a folder that goes away with the block.

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
    vectors = retriever.encode_passages(passages, [()] * len(passages))
    none = np.zeros((0, retriever.dim), np.float32)
    rows = [PassageRow(passages[i], vectors[i][0], (), none) for i in first.values()]
    with TemporaryDirectory(prefix="knowstore-mining-", ignore_cleanup_errors=True) as folder:
        table = PassageTable.open(folder, dim=retriever.dim, create=True)
        for start in range(0, len(rows), _ROWS):
            table.add(rows[start : start + _ROWS], _BATCH)
        table.optimize()

        def search(question: str) -> list[int]:
            vector = retriever.encode_questions([question])[0]
            by_text = table.search_text(question, _N_FOUND, at=None)
            by_vector = table.search_vector(vector, _N_FOUND, at=None)
            in_turn = chain.from_iterable(zip_longest(by_text, by_vector))
            return list(dict.fromkeys(first[found.id] for found in in_turn if found is not None))

        yield search
