"""A store with a past, and the commands that are interrupted on copies of it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from alembic.config import Config
from alembic.script import ScriptDirectory

from knowstore._loaded import LoadedModels
from knowstore.audits import add_probes, run_audit
from knowstore.catalog import schema
from knowstore.config import BankConfig, GenerationConfig, RetrievalConfig
from knowstore.errors import ConfigError, PassageError, UnknownPassageError
from knowstore.records import Passage, Probe
from knowstore.store import KnowledgeStore
from tests.faults.models import OTHER
from tests.faults.places import Place

_RETRIEVAL = RetrievalConfig(n_candidates=60, null_threshold=None)
_GENERATION = GenerationConfig(max_tokens=2)
_BANK = BankConfig(codec="float16")  # latents of stand-ins have three numbers, which several passages share


def open_store(folder: Path, models: LoadedModels, catalog_url: str | None = None) -> KnowledgeStore:
    """The store in `folder`, with the stand-ins for its models."""
    store = KnowledgeStore.open(
        folder, catalog_url=catalog_url, bank=_BANK, retrieval=_RETRIEVAL, generation=_GENERATION
    )
    store.models, store._followed = models, None
    return store


@dataclass(frozen=True)
class Scene:
    """A folder with a store in `kb`, the same in `changed` after it went over to other models, a changed source, an
    exported bank, and what the commands are about.

    Only a store is copied for a trial; what else is in the folder is read alone. `needles` are bytes of text and
    tensors that a purge must leave in no file. `server` is the URL of where the catalogs are, when not in the stores.
    """

    folder: Path
    server: str | None
    replaced: str
    removed: list[str]
    purged: list[str]
    needles: list[bytes]

    @classmethod
    def make(cls, folder: Path, seed: int, models: LoadedModels, server: str | None = None) -> Scene:
        """Give stores a past that the seed decides; passages are removed, superseded, shared and revived in it, probes
        are kept and asked."""
        draw = random.Random(seed)
        facts = [_fact(seed, number) for number in range(20)]
        n_first, n_second = draw.randint(5, 8), draw.randint(2, 4)
        first, second, new = facts[:n_first], facts[n_first : n_first + n_second], facts[n_first + n_second :]
        folder.mkdir()
        kb, changed = Place(folder / "kb", server), Place(folder / "changed", server)
        kb.begin()
        store = open_store(kb.folder, models, kb.catalog_url)
        one, two = folder / "one.jsonl", folder / "two.jsonl"
        _write(one, first)
        store.ingest([str(one)])
        _write(two, [*second, first[0]])  # first[0] has two sources
        store.ingest([str(two)])
        _write(one, first[:-1])  # first[-1] is superseded
        store.ingest([str(one)])
        store.remove([second[0].passage_id])
        add_probes(store, [("here", probe) for probe in _probes([*first[:4], second[1]])])
        run_audit(store)
        store.replace(second[1].passage_id, new[0])
        purged = [first[1].passage_id, second[0].passage_id]  # one that is live, one that is not
        needles = [one.text.encode() for one in facts if one.passage_id in purged]
        store.export(folder / "bank")
        store.close()
        changed.begin(kb)
        store = open_store(changed.folder, models, changed.catalog_url)
        _change_over(store)
        store.add([new[6]])  # has no expert of the first models
        needles += [expert.data for bank in store._tables.banks() for expert in bank.iter_encoded(purged)]
        store.close()
        _write(one, [*first[2:], *new[1:3]])  # gives up first[0] and first[1], brings first[-1] back, has two new ones
        _write(folder / "new.jsonl", new[3:6])
        _write_next_schema(folder / "migrations")
        return cls(folder, server, first[2].passage_id, [first[3].passage_id, new[0].passage_id], purged, needles)

    def place(self, name: str) -> Place:
        """Where a store of the scene is."""
        return Place(self.folder / name, self.server)

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


def _probes(passages: Sequence[Passage]) -> Iterator[Probe]:
    for one in passages:
        yield Probe(f"Who is the mayor of {one.title}?", (one.text.split()[-1],), "reliability", one.passage_id)
    yield Probe("Who wrote Faust?", (), "locality", None)


def _write(path: Path, passages: Sequence[Passage]) -> None:
    rows = ({"title": one.title, "text": one.text, "date": one.date} for one in passages)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@dataclass(frozen=True)
class Command:
    """What is interrupted. `already` are errors that say, when it is run again, that it had been done.

    `around` is how the process differs that runs it; `store` the scene's store that it changes, None when it begins
    one.
    """

    run: Callable[[KnowledgeStore, Scene], object]
    already: tuple[type[Exception], ...] = ()
    around: Callable[[Path], Any] | None = None
    store: Literal["kb", "changed"] | None = "kb"
    is_purge: bool = False

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


@contextmanager
def _small_parts(_: Path) -> Iterator[None]:
    """Experts are made, and answers kept, a few at a time."""
    with patch("knowstore._encoding.CHUNK", 3), patch("knowstore.audits.run._KEPT_AT_ONCE", 2):
        yield


def _change_over(store: KnowledgeStore) -> None:
    """`knowstore --hypernetwork other reexpert`"""
    store.models, store._is_following = store.models.with_config(OTHER), False
    store.reexpert()


def _audit(store: KnowledgeStore, _: Scene) -> None:
    """`knowstore audit`, with `--resume` where one was cut short; not again when it has ended."""
    log = store.catalog.audits
    is_cut_short = bool(log.audits(finished=False))
    if is_cut_short or log.audits()[-1].batch_id < store.catalog.head():
        run_audit(store, resume=is_cut_short)


_REVISION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "fault", {head!r}, None, None

def upgrade() -> None:
    recreate = "always" if op.get_bind().dialect.name == "sqlite" else "never"
    with op.batch_alter_table("edit_batches", recreate=recreate) as batch:
        batch.add_column(sa.Column("extra", sa.Text, nullable=False, server_default="x"))
    with op.batch_alter_table("placements", recreate=recreate) as batch:
        batch.alter_column("source", new_column_name="origin")
    with op.batch_alter_table("placements", recreate=recreate) as batch:
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
    "create": Command(lambda store, scene: store.add(scene.new), (PassageError,), store=None),
    "ingest": Command(lambda store, scene: store.ingest([str(scene.folder / "one.jsonl")])),
    "add": Command(lambda store, scene: store.add(scene.new), (PassageError,)),
    "replace": Command(lambda store, scene: store.replace(scene.replaced, scene.new[0]), (UnknownPassageError,)),
    "remove": Command(lambda store, scene: store.remove(scene.removed), (UnknownPassageError,)),
    "rollback": Command(lambda store, scene: store.rollback(2)),
    "purge": Command(lambda store, scene: store.remove(scene.purged, purge=True), is_purge=True),
    "purge of two banks": Command(
        lambda store, scene: store.remove(scene.purged, purge=True), store="changed", is_purge=True
    ),
    "compaction": Command(lambda store, scene: store.add(scene.new), (PassageError,), _eager_upkeep),
    "import": Command(lambda store, scene: store.import_(scene.folder / "bank"), store=None),
    "migration": Command(lambda store, scene: store.catalog.check(), (), _next_schema),
    "reexpert": Command(lambda store, scene: _change_over(store), (), _small_parts),
    "reexpert --undo": Command(lambda store, scene: store.reexpert(is_undone=True), (ConfigError,), store="changed"),
    "reexpert --drop-previous": Command(lambda store, scene: store.drop_previous(), store="changed"),
    "audit": Command(_audit, (), _small_parts),
}
