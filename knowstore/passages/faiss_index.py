"""An in-memory FAISS index over the vectors of one snapshot, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any, Literal, Self

import numpy as np

from knowstore.config import Filters
from knowstore.errors import ConfigError, RetrievalError
from knowstore.passages.rows import Candidate, Floats
from knowstore.passages.table import PassageTable

_TIE = 1e-6  # relative; scores this close may be ordered either way by a product in float32


class FaissIndex:
    """Exact inner-product search (Eq. 7) over the passages that are live at edit batch `at`.

    It does not follow the table: when a newer batch is committed, build another.
    """

    def __init__(self, index: Any, ids: Sequence[str], at: int, device: Literal["cpu", "cuda"]) -> None:
        self._index = index
        self._ids = ids
        self.at = at
        self.device = device

    @classmethod
    def build(cls, table: PassageTable, at: int, *, device: Literal["auto", "cpu", "cuda"] = "auto") -> Self:
        """Read the vectors visible at `at` into memory, 4 E bytes each.

        Args:
            table: the passages.
            at: latest committed edit batch of the snapshot.
            device: `auto` takes a GPU when there is one that the installed faiss can use.

        Raises:
            ConfigError: no faiss, two that break each other, or no GPU where one was asked for.
            PassageError: the table cannot be read.
        """
        faiss = _import_faiss()
        has_gpu = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
        if device == "cuda" and not has_gpu:
            raise ConfigError(
                "the installed faiss finds no GPU",
                kept="nothing was changed",
                fix="run `pip uninstall faiss-cpu` and `pip install 'knowstore[gpu]'`, or search on the CPU",
            )
        ids: list[str] = []
        vectors = [np.empty((0, table.dim), np.float32)]
        for batch in table.iter_rows(at, ["id", "vector"]):
            ids += batch.column("id").to_pylist()
            vectors.append(batch.column("vector").flatten().to_numpy().reshape(-1, table.dim))
        index = faiss.IndexFlatIP(table.dim)
        index.add(np.concatenate(vectors))  # (N, E)
        if has_gpu and device != "cpu":
            return cls(faiss.index_cpu_to_all_gpus(index, ngpu=1), ids, at, "cuda")
        return cls(index, ids, at, "cpu")

    def __len__(self) -> int:
        return len(self._ids)

    def search(self, vector: Floats, n: int) -> list[tuple[str, float]]:
        """Ids and inner products of the `n` best passages for `vector` (E,), equal ones by id.

        Raises:
            RetrievalError: a vector of another width.
        """
        query = np.asarray(vector, np.float32)
        if query.shape != (self._index.d,):
            raise RetrievalError(
                f"the question's vector is {query.shape}, this index holds ({self._index.d},)",
                kept="the index is as it was",
                fix="embed the question with the retriever that the store was made with",
            )
        limit = min(n + 1, len(self))
        while limit > 0 and n > 0:
            scores, rows = self._index.search(query[None], limit)
            hits = sorted(
                ((self._ids[row], float(score)) for row, score in zip(rows[0], scores[0], strict=True)),
                key=lambda hit: (-hit[1], hit[0]),
            )
            if limit == len(self) or hits[n - 1][1] - hits[-1][1] > _TIE * max(1.0, abs(hits[-1][1])):
                return hits[:n]
            limit = min(limit * 4, len(self))
        return []

    def candidates(
        self, table: PassageTable, vector: Floats, n: int, *, filters: Filters | None = None
    ) -> list[Candidate]:
        """The `n` best passages that match `filters`, read from `table`; more are tried while too few match.

        Raises:
            RetrievalError: as for `search`.
            FilterError: a filter that cannot be read.
            PassageError: the table cannot be read.
        """
        tried = n
        while True:
            hits = self.search(vector, tried)
            found = table.candidates([passage_id for passage_id, _ in hits], vector, at=self.at, filters=filters)
            if len(found) >= n or len(hits) == len(self):
                return found[:n]
            tried = min(tried * 4, len(self))


def _import_faiss() -> Any:
    installed = sorted(
        {
            name
            for distribution in metadata.distributions()
            if (name := (distribution.name or "").lower().replace("_", "-")).startswith(("faiss-cpu", "faiss-gpu"))
        }
    )
    if len(installed) > 1:
        raise ConfigError(
            f"{' and '.join(installed)} are both installed; they share one module and break each other",
            kept="nothing was changed",
            fix=f"run `pip uninstall {' '.join(installed)}`, then `pip install 'knowstore[cpu]'` or `'knowstore[gpu]'`",
        )
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"the faiss index needs faiss, which cannot be imported: {error}",
            kept="nothing was changed",
            fix="run `pip install 'knowstore[cpu]'` (or `'knowstore[gpu]'`), or search with the index in LanceDB",
        ) from error
    return faiss
