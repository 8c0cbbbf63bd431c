"""A store with a past, and the commands that are interrupted on copies of it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from alembic.config import Config
from alembic.script import ScriptDirectory

from knowstore._loaded import LoadedModels
from knowstore.catalog import schema
from knowstore.config import GenerationConfig, RetrievalConfig
from knowstore.errors import PassageError, UnknownPassageError
from knowstore.records import Passage
from knowstore.store import KnowledgeStore

_RETRIEVAL = RetrievalConfig(n_candidates=60, null_threshold=None)
_GENERATION = GenerationConfig(max_tokens=2)


def open_store(folder: Path, models: LoadedModels, catalog_url: str | None = None) -> KnowledgeStore:
    """The store in `folder`, with the stand-ins for its models."""
    store = KnowledgeStore.open(folder, catalog_url=catalog_url, retrieval=_RETRIEVAL, generation=_GENERATION)
    store.models = models
    return store


@dataclass(frozen=True)
class Scene:
    """A folder with a store in `kb`, a changed source, an exported bank, and what the commands are about.

    Only the store is copied for a trial; what else is in the folder is read alone. `needles` are bytes of text and
    tensors that a purge must leave in no file.
    """

    folder: Path
    replaced: str
    removed: list[str]
    purged: list[str]
    needles: list[bytes]

    @classmethod
    def make(cls, folder: Path, seed: int, models: LoadedModels) -> Scene:
        """Give a store a past that the seed decides; passages are removed, superseded, shared and revived in it."""
        draw = random.Random(seed)
        facts = [_fact(seed, number) for number in range(20)]
        n_first, n_second = draw.randint(5, 8), draw.randint(2, 4)
        first, second, new = facts[:n_first], facts[n_first : n_first + n_second], facts[n_first + n_second :]
        folder.mkdir()
        store = open_store(folder / "kb", models)
        one, two = folder / "one.jsonl", folder / "two.jsonl"
        _write(one, first)
        store.ingest([str(one)])
        _write(two, [*second, first[0]])  # first[0] has two sources
        store.ingest([str(two)])
        _write(one, first[:-1])  # first[-1] is superseded
        store.ingest([str(one)])
        store.remove([second[0].passage_id])
        store.replace(second[1].passage_id, new[0])
        purged = [first[1].passage_id, second[0].passage_id]  # one that is live, one that is not
        needles = [one.text.encode() for one in facts if one.passage_id in purged]
        needles += [expert.data for expert in store._tables.bank().iter_encoded(purged)]
        store.export(folder / "bank")
        store.close()
        _write(one, [*first[2:], *new[1:3]])  # gives up first[0] and first[1], brings first[-1] back, has two new ones
        _write(folder / "new.jsonl", new[3:6])
        _write_next_schema(folder / "migrations")
        return cls(folder, first[2].passage_id, [first[3].passage_id, new[0].passage_id], purged, needles)

    @property
    def packed(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "folder": str(self.folder), "needles": [one.hex() for one in self.needles]}

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> Scene:
        needles = [bytes.fromhex(one) for one in packed["needles"]]
        return cls(**{**packed, "folder": Path(packed["folder"]), "needles": needles})

    @property
    def new(self) -> list[Passage]:
        """Passages that the store has never held."""
        return [Passage(**json.loads(line)) for line in (self.folder / "new.jsonl").read_text("utf-8").splitlines()]


def _fact(seed: int, number: int) -> Passage:
    return Passage(f"Town {number} of land {seed} lies {number * 7 + 3} miles inland. Its mayor is M{seed}x{number}.",
                   f"Town {number}", date=f"20{number:02d}-01-01")  # fmt: skip


def _write(path: Path, passages: Sequence[Passage]) -> None:
    rows = ({"title": one.title, "text": one.text, "date": one.date} for one in passages)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@dataclass(frozen=True)
class Command:
    """What is interrupted. `already` are errors that say, when it is run again, that it had been done.

    `around` is how the process differs that runs it; `is_first` that it begins a store and does not change the scene's.
    """

    run: Callable[[KnowledgeStore, Scene], object]
    already: tuple[type[Exception], ...] = ()
    around: Callable[[Path], Any] | None = None
    is_first: bool = False

    @contextmanager
    def surroundings(self, scene: Scene) -> Iterator[None]:
        if self.around is None:
            yield
            return
        with self.around(scene.folder):
            yield


@contextmanager
def _eager_upkeep(_: Path) -> Iterator[None]:
    """Compaction and indexes as large stores have them."""
    with (
        patch("knowstore.bank.bank._MOST_FILES", 1),
        patch("knowstore.bank.bank._ID_INDEX_ROWS", 1),
        patch("knowstore.passages.table._ID_INDEX_ROWS", 1),
    ):
        yield


_REVISION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "fault", {head!r}, None, None

def upgrade() -> None:
    with op.batch_alter_table("edit_batches", recreate="always") as batch:
        batch.add_column(sa.Column("extra", sa.Text, nullable=False, server_default="x"))
    with op.batch_alter_table("placements", recreate="always") as batch:
        batch.alter_column("source", new_column_name="origin")
    with op.batch_alter_table("placements", recreate="always") as batch:
        batch.alter_column("origin", new_column_name="source")
"""


def _write_next_schema(folder: Path) -> None:
    original = schema._config()
    shutil.copytree(str(original.get_main_option("script_location")), folder)
    revision = _REVISION.format(head=ScriptDirectory.from_config(original).get_current_head())
    (folder / "versions" / "fault.py").write_text(revision)


@contextmanager
def _next_schema(folder: Path) -> Iterator[None]:
    """A version of knowstore whose schema is one revision further; SQLite copies whole tables for it."""
    config = Config()
    config.set_main_option("script_location", str(folder / "migrations"))
    with patch("knowstore.catalog.schema._config", lambda: config):
        yield


COMMANDS = {
    "create": Command(lambda store, scene: store.add(scene.new), (PassageError,), is_first=True),
    "ingest": Command(lambda store, scene: store.ingest([str(scene.folder / "one.jsonl")])),
    "add": Command(lambda store, scene: store.add(scene.new), (PassageError,)),
    "replace": Command(lambda store, scene: store.replace(scene.replaced, scene.new[0]), (UnknownPassageError,)),
    "remove": Command(lambda store, scene: store.remove(scene.removed), (UnknownPassageError,)),
    "rollback": Command(lambda store, scene: store.rollback(2)),
    "purge": Command(lambda store, scene: store.remove(scene.purged, purge=True)),
    "compaction": Command(lambda store, scene: store.add(scene.new), (PassageError,), _eager_upkeep),
    "import": Command(lambda store, scene: store.import_(scene.folder / "bank"), is_first=True),
    "migration": Command(lambda store, scene: store.catalog.check(), (), _next_schema),
}
