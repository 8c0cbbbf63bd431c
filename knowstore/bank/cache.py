"""Recently used experts, decoded in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from knowstore.bank.expert import StoredExpert


@dataclass(frozen=True)
class CacheInfo:
    """What the memory of decoded experts holds and how often it had what was asked for."""

    hits: int
    misses: int
    n_experts: int
    size_bytes: int
    max_bytes: int


class ExpertCache:
    """Decoded experts, least recently used out first, at most `max_bytes` of tensors; safe in threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._experts: OrderedDict[str, StoredExpert] = OrderedDict()
        self._size_bytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def get(self, ids: Collection[str]) -> dict[str, StoredExpert]:
        with self._lock:
            found = {passage_id: self._experts[passage_id] for passage_id in ids if passage_id in self._experts}
            for passage_id in found:
                self._experts.move_to_end(passage_id)
            self._hits += len(found)
            self._misses += len(set(ids)) - len(found)
            return found

    def put(self, experts: Iterable[StoredExpert]) -> None:
        with self._lock:
            for expert in experts:
                if expert.size_bytes <= self._max_bytes:
                    self._remove(expert.passage_id)
                    self._experts[expert.passage_id] = expert
                    self._size_bytes += expert.size_bytes
            while self._size_bytes > self._max_bytes:
                self._remove(next(iter(self._experts)))

    def drop(self, ids: Iterable[str]) -> None:
        with self._lock:
            for passage_id in ids:
                self._remove(passage_id)

    def clear(self) -> None:
        with self._lock:
            self._experts.clear()
            self._size_bytes = 0

    def info(self) -> CacheInfo:
        with self._lock:
            return CacheInfo(self._hits, self._misses, len(self._experts), self._size_bytes, self._max_bytes)

    def _remove(self, passage_id: str) -> None:
        expert = self._experts.pop(passage_id, None)
        if expert is not None:
            self._size_bytes -= expert.size_bytes
