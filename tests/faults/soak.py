"""Many readers and writers of one store at once, in processes and threads; readers look for torn states.

Each writer has sources of its own, and every edit batch changes a source whole: all of its passages carry one version.
So whoever sees a part of a source's passages, or two versions of them, has seen a torn state.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from knowstore._loaded import LoadedModels
from knowstore.errors import CatalogError, KnowledgeStoreError, PassageError, StoreLockedError, UnknownPassageError
from knowstore.store import KnowledgeStore
from tests.faults.checks import disagreements, leftovers
from tests.faults.scenes import open_store
from tests.faults.trials import fork

N_WRITERS, N_READERS = 3, 8
_N_SOURCES, _N_PASSAGES = 2, 4  # of each writer; of each source
_READER_THREADS = 2  # of a process, on one store
_PAUSE_S = 0.02


def soak(folder: Path, models: LoadedModels, seconds: float, catalog_url: str | None, seed: int) -> int:
    """Run readers and writers for a time, print what they met, and return how many things were wrong."""
    folder.mkdir()
    fork_and_wait(lambda: open_store(folder / "kb", models, catalog_url).close())
    until = time.time() + seconds
    workers: list[Callable[[], object]] = [
        lambda names=names: _work(
            [lambda name=name: _Writer(folder, models, catalog_url, seed, name).run(until) for name in names],
            folder / f"writer{names[0]}.json",
        )
        for names in ((0,), (1, 2))  # one process with one writer, one with two
    ]
    workers += [
        lambda first=first: _work(
            _readers(folder, models, catalog_url, seed + first, until), folder / f"reader{first}.json"
        )
        for first in range(0, N_READERS, _READER_THREADS)
    ]
    for child in [fork(worker) for worker in workers]:
        os.waitpid(child, 0)
    counted: Counter[str] = Counter()
    for path in sorted(folder.glob("*.json")):
        counted.update(json.loads(path.read_text()))
    if len(list(folder.glob("*.json"))) != len(workers):
        counted["error: a worker died"] += 1
    last = folder / "last"
    fork_and_wait(lambda: last.write_text(json.dumps(_last_look(folder / "kb", models, catalog_url))))
    counted.update({f"error: {problem}": 1 for problem in json.loads(last.read_text())})
    return _report(counted, seconds, catalog_url)


def fork_and_wait(work: Callable[[], object]) -> None:
    os.waitpid(fork(work), 0)


def _last_look(folder: Path, models: LoadedModels, catalog_url: str | None) -> list[str]:
    """What is wrong when all have ended, once a writer has taken up what a refused one left."""
    with open_store(folder, models, catalog_url) as store:
        store.verify(repair=True)
        return [*disagreements(store), *leftovers(store), *(one.detail for one in store.verify().problems)]


def _report(counted: Counter[str], seconds: float, catalog_url: str | None) -> int:
    name = "PostgreSQL" if catalog_url else "SQLite"
    table = Table("what", "how often", title=f"{N_READERS} readers and {N_WRITERS} writers, {seconds:g} s, {name}")
    for what, n in sorted(counted.items()):
        table.add_row(what, str(n))
    for what in ("torn", "error"):
        table.add_row(f"all of {what}", str(sum(n for key, n in counted.items() if key.startswith(what))))
    Console(width=120).print(table)
    return sum(n for key, n in counted.items() if key.startswith(("torn", "error")))


def _work(parts: Iterable[Callable[[], Counter[str]]], answer: Path) -> None:
    """Run each part in a thread of its own and write what they counted together."""
    counted: Counter[str] = Counter()
    lock = threading.Lock()

    def run(part: Callable[[], Counter[str]]) -> None:
        try:
            found = part()
        except Exception:
            found = Counter({"error: " + traceback.format_exc()[-600:]: 1})
        with lock:
            counted.update(found)

    threads = [threading.Thread(target=run, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answer.write_text(json.dumps(counted))


class _Writer:
    """Changes its own sources whole, again and again: new versions, removal, rollback, purge."""

    def __init__(self, folder: Path, models: LoadedModels, catalog_url: str | None, seed: int, name: int) -> None:
        self._folder, self._name = folder, name
        self._store = open_store(folder / "kb", models, catalog_url)
        self._draw = random.Random(f"{seed}/{name}")
        self._versions = itertools.count()
        self._counted: Counter[str] = Counter()

    def run(self, until: float) -> Counter[str]:
        kinds = {self._ingest: 5, self._remove: 2, self._flip: 2, self._roll_back: 1, self._purge: 2}
        while time.time() < until:
            write = self._draw.choices(list(kinds), list(kinds.values()))[0]
            try:
                write(self._folder / f"writer{self._name}source{self._draw.randrange(_N_SOURCES)}.jsonl")
                self._counted["commits"] += 1
            except StoreLockedError:
                self._counted["conflicts"] += 1
            except (_Nothing, UnknownPassageError):  # another has rolled back what was to be removed
                self._counted["nothing to do"] += 1
            except KnowledgeStoreError as error:
                self._counted[f"error: {write.__name__}: {error.what[:200]}"] += 1
            time.sleep(self._draw.uniform(0, _PAUSE_S))
        self._store.close()
        return self._counted

    def _ingest(self, source: Path) -> None:
        version = f"{self._name}.{next(self._versions)}"
        rows = (
            {"title": f"{source.stem} part {part}", "text": f"Town {part} is in version {version} of {source.stem}."}
            for part in range(_N_PASSAGES)
        )
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._store.ingest([str(source)])

    def _remove(self, source: Path) -> None:
        self._store.remove(self._live(source))

    def _flip(self, source: Path) -> None:
        """Two batches as fast as they can follow each other; the second brings back what the first removed."""
        batch_id = self._store.remove(self._live(source)).batch_id
        assert batch_id is not None
        self._counted["commits"] += 1
        self._store.rollback(batch_id)

    def _purge(self, source: Path) -> None:
        self._store.remove(self._live(source), purge=True)
        self._counted["purges"] += 1

    def _roll_back(self, _: Path) -> None:
        """Undo the latest batch, whoever made it; what others purge or commit meanwhile may forbid it."""
        batches = self._store.batches(1)
        if not batches or batches[0].state != "live":
            raise _Nothing
        try:
            self._store.rollback(batches[0].id)
        except CatalogError as error:
            if "purged" in error.what:
                raise _Nothing from error
            raise

    def _live(self, source: Path) -> list[str]:
        ids = [passage_id for passage_id, _ in self._store.catalog.live_placements(source=str(source))]
        if not ids:
            raise _Nothing
        return ids


class _Nothing(Exception):  # noqa: N818 - no error
    """There is nothing to do for this kind of write just now."""


def _readers(
    folder: Path, models: LoadedModels, catalog_url: str | None, seed: int, until: float
) -> list[Callable[[], Counter[str]]]:
    store = open_store(folder / "kb", models, catalog_url)
    return [
        lambda number=number: _read(store, random.Random(seed + number), until) for number in range(_READER_THREADS)
    ]


def _read(store: KnowledgeStore, draw: random.Random, until: float) -> Counter[str]:
    counted: Counter[str] = Counter()
    looks: dict[str, Callable[[], list[tuple[str, str]]]] = {
        "list": lambda: [(one.passage.title, one.passage.text) for one in store.passages()],
        "retrieve": lambda: [(hit.title, hit.text) for hit in store.retrieve("Which town is in which version?")],
        "ask": lambda: [(hit.title, hit.text) for hit in store.ask("Which town is in which version?").hits],
    }
    while time.time() < until:
        name = draw.choice(list(looks))
        try:
            counted.update({f"torn {name}: {problem}": 1 for problem in torn(looks[name]())})
            counted[f"reads by {name}"] += 1
        except PassageError as error:
            if "holds no passage yet" not in error.what:
                counted[f"error: {name}: {error.what[:200]}"] += 1
        except KnowledgeStoreError as error:
            counted[f"error: {name}: {error.what[:200]}"] += 1
    return counted


def torn(seen: Iterable[tuple[str, str]]) -> list[str]:
    """Sources of which a reader saw a part, or several versions, given the titles and texts that it saw."""
    parts: dict[str, list[str]] = {}
    for title, text in seen:
        parts.setdefault(title.split(" ")[0], []).append(text.split(" version ")[1].split(" ")[0])
    return [
        f"{source} in versions {versions}"
        for source, versions in parts.items()
        if len(versions) != _N_PASSAGES or len(set(versions)) != 1
    ]
