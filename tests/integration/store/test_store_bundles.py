"""Export and import of a bank, and bundles that are damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lancedb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from knowstore.config import BankConfig, ModelConfig
from knowstore.errors import ConfigError, FingerprintError, KnowledgeStoreError, PassageError, SourceError
from knowstore.records import Passage
from knowstore.store import KnowledgeStore

Open = Callable[..., KnowledgeStore]
Look = Callable[[KnowledgeStore], object]


@pytest.fixture(scope="session")
def exported(
    facts: list[Passage], tiny_models: ModelConfig, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The store `origin`, which holds facts 0 to 2 and 4, and 3 removed; 0 has two sources. `bundle` is its export."""
    folder = tmp_path_factory.mktemp("exported")
    with KnowledgeStore.open(folder / "origin", models=tiny_models, cache_dir=cache_dir) as store:
        store.add(facts[:4])
        store.remove([facts[3].passage_id])
        store.add([replace(facts[0], source="elsewhere"), facts[4]])
        assert store.export(folder / "bundle") == 4
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to be damaged."""
    return Path(shutil.copytree(exported / "bundle", tmp_path / "bundle"))


def test_an_imported_bank_answers_like_the_one_it_was_exported_from(
    bundle: Path, exported: Path, open_store: Open, visible: Look, n_generated: Callable[[], int]
) -> None:
    store = open_store()
    report = store.import_(bundle, note="from there")
    assert (report.batch_id, report.passages_added, report.passages_unchanged, n_generated()) == (1, 4, 0, 0)
    assert visible(store) == visible(open_store(exported / "origin"))
    assert (store.batches()[0].kind, store.batches()[0].note) == ("import", "from there")
    assert store.verify().problems == ()
    again = store.import_(bundle)
    assert (again.batch_id, again.passages_added, again.passages_unchanged) == (None, 0, 4)
    store.rollback(1)
    assert (store.passages(), store.verify().problems) == ([], ())
    assert store.import_(bundle).passages_added == 4
    assert (len(store.passages()), store.verify().problems) == (4, ())


def test_an_import_into_a_store_with_other_passages_and_another_codec_adds_what_is_new(
    bundle: Path, open_store: Open, facts: list[Passage]
) -> None:
    store = open_store(bank=BankConfig(codec="float32"))
    store.add([facts[0], facts[5]])
    report = store.import_(bundle)
    assert (report.passages_added, report.passages_unchanged) == (3, 1)
    assert len(store.ask("When was Rome founded?").experts) == 4
    assert store.verify().problems == ()


def test_an_export_that_fails_leaves_its_folder_empty_to_be_run_again(
    exported: Path, open_store: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(exported / "origin")
    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", _disk_full)
        with pytest.raises(OSError, match="No space"):
            store.export(tmp_path / "again")
    assert list((tmp_path / "again").iterdir()) == []
    assert store.export(tmp_path / "again") == 4


def test_a_damaged_store_is_not_exported(open_store: Open, facts: list[Passage], tmp_path: Path) -> None:
    store = open_store(tmp_path / "damaged")
    store.add(facts[:2])
    lancedb.connect(store.layout.tables).open_table("experts").delete(f"id = '{facts[0].passage_id}'")
    with pytest.raises(PassageError, match="1 experts are missing"):
        open_store(tmp_path / "damaged").export(tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []


def _disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_export_of_no_passage_can_be_imported(open_store: Open, facts: list[Passage], tmp_path: Path) -> None:
    store = open_store()
    store.add(facts[:1])
    store.remove([facts[0].passage_id])
    assert store.export(tmp_path / "nothing") == 0
    for place in ("kb", "fresh"):
        report = open_store(place).import_(tmp_path / "nothing")
        assert (report.batch_id, report.passages_added) == (None, 0)


def test_an_export_needs_an_empty_folder(bundle: Path, exported: Path, open_store: Open) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    for folder in (bundle, bundle / "manifest.json"):
        with pytest.raises(ConfigError, match="empty folder"):
            open_store(exported / "origin").export(folder)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def _rewrite(path: Path, **columns: Callable[[list[object]], list[object]]) -> None:
    table = pq.read_table(path)
    for name, change in columns.items():
        values = pa.array(change(table[name].to_pylist()), table.schema.field(name).type)
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)
    pq.write_table(table, path)


def _retype(path: Path, name: str, column: Callable[[int], pa.Array]) -> None:
    """Put a column of so many rows in the place of another, as small as it goes."""
    table = pq.read_table(path)
    changed = table.set_column(table.schema.get_field_index(name), name, column(table.num_rows))
    pq.write_table(changed, path, compression="zstd", use_dictionary=False)


def _endless_lists(n_rows: int) -> pa.Array:
    """The first list has 32 million numbers; they take a few hundred bytes in a file."""
    ends = pa.array([0, *[1 << 25] * n_rows], pa.int32())
    return pa.ListArray.from_arrays(ends, pa.nulls(1 << 25, pa.int32()))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_byte(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0xFF
    path.write_bytes(bytes(data))


def _other_manifest(bundle: Path, **changes: object) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "pipe for manifest": lambda b: _pipe(b / "manifest.json"),
    "pipe for experts": lambda b: _pipe(b / "experts.parquet"),
    "manifest nested too deeply": lambda b: (b / "manifest.json").write_text("[" * 100_000),
    "expert of another passage": lambda b: _rewrite(b / "experts.parquet", passage_id=lambda ids: ids[::-1]),
    "truncated passages": lambda b: _truncate(b / "passages.parquet"),
    "truncated experts": lambda b: _truncate(b / "experts.parquet"),
    "truncated sources": lambda b: _truncate(b / "sources.parquet"),
    "missing passages": lambda b: (b / "passages.parquet").unlink(),
    "missing experts": lambda b: (b / "experts.parquet").unlink(),
    "missing manifest": lambda b: (b / "manifest.json").unlink(),
    "manifest of another format": lambda b: _other_manifest(b, format=99),
    "manifest is a list": lambda b: (b / "manifest.json").write_text("[1]"),
    "manifest is text": lambda b: (b / "manifest.json").write_text("hello"),
    "manifest is binary": lambda b: (b / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "manifest without fingerprints": lambda b: _other_manifest(b, fingerprints=None),
    "tampered text": lambda b: _rewrite(b / "passages.parquet", text=lambda texts: [*texts[:-1], "Nero did it."]),
    "tampered id": lambda b: _rewrite(b / "passages.parquet", id=lambda ids: ["0" * 32] * len(ids)),
    "swapped texts": lambda b: _rewrite(b / "passages.parquet", text=lambda texts: texts[::-1]),
    "the same passage twice": lambda b: _rewrite(b / "passages.parquet", id=lambda ids: [ids[0], *ids[:-1]]),
    "tampered tensors": lambda b: _rewrite(b / "experts.parquet", data=lambda rows: [*rows[:-1], b"\0" * 64]),
    "expert of nobody": lambda b: _rewrite(b / "experts.parquet", passage_id=lambda ids: ["0" * 32] * len(ids)),
    "null texts": lambda b: _rewrite(b / "passages.parquet", text=lambda texts: [None] * len(texts)),
    "null spans": lambda b: _rewrite(b / "passages.parquet", segments=lambda rows: [None] * len(rows)),
    "odd spans": lambda b: _rewrite(b / "passages.parquet", segments=lambda rows: [[0, 5, 6]] * len(rows)),
    "spans outside": lambda b: _rewrite(b / "passages.parquet", segments=lambda rows: [[0, 9999]] * len(rows)),
    "torn vectors": lambda b: _rewrite(b / "passages.parquet", segment_vectors=lambda rows: [b"abc"] * len(rows)),
    "null vectors": lambda b: _rewrite(b / "passages.parquet", vector=lambda rows: [None] * len(rows)),
    "vectors of nan": lambda b: _rewrite(b / "passages.parquet", vector=lambda rows: [[float("nan")] * 32] * len(rows)),
    "null ranks": lambda b: _rewrite(b / "experts.parquet", segment_ranks=lambda rows: [None] * len(rows)),
    "null data": lambda b: _rewrite(b / "experts.parquet", data=lambda rows: [None] * len(rows)),
    "null ids": lambda b: _rewrite(b / "sources.parquet", passage_id=lambda ids: [None] * len(ids)),
    "null sources": lambda b: _rewrite(b / "sources.parquet", source=lambda ids: [None] * len(ids)),
    "ids that are none": lambda b: _rewrite(b / "sources.parquet", passage_id=lambda ids: [*ids[:-1], "x'; --"]),
    "passages with other columns": lambda b: pq.write_table(pa.table({"id": ["a"]}), b / "passages.parquet"),
    "experts with other columns": lambda b: pq.write_table(pa.table({"a": ["a"]}), b / "experts.parquet"),
    "sources with other columns": lambda b: pq.write_table(pa.table({"a": ["a"]}), b / "sources.parquet"),
    "texts are numbers": lambda b: _retype(b / "passages.parquet", "text", lambda n: pa.array([7] * n)),
    "ids are structs": lambda b: _retype(b / "passages.parquet", "id", lambda n: pa.array([{"a": 1}] * n)),
    "sources are lists": lambda b: _retype(b / "sources.parquet", "source", lambda n: pa.array([["a"]] * n)),
    "ranks are text": lambda b: _retype(b / "experts.parquet", "rank", lambda n: pa.array(["4"] * n)),
    "lists without end": lambda b: _retype(b / "experts.parquet", "segment_ranks", _endless_lists),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused_and_nothing_is_changed(
    damage: str, bundle: Path, open_store: Open, facts: list[Passage]
) -> None:
    store = open_store()
    store.add([facts[5]])
    DAMAGES[damage](bundle)
    with pytest.raises(KnowledgeStoreError) as refused:
        store.import_(bundle)
    assert isinstance(refused.value, SourceError) or "checksum" in str(refused.value)
    assert ([one.passage for one in store.passages()], store.verify().problems) == ([facts[5]], ())
    assert (store.catalog.staged(), store.stats().experts) == (None, 1)


@pytest.mark.parametrize("at", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", ["passages.parquet", "experts.parquet", "sources.parquet"])
def test_a_bundle_with_a_flipped_byte_is_refused_or_imported_whole(
    name: str, at: float, bundle: Path, open_store: Open
) -> None:
    store = open_store()
    _flip_a_byte(bundle / name, at)
    try:
        report = store.import_(bundle)
    except KnowledgeStoreError:
        assert store.passages() == []
    else:
        assert report.passages_added == len(store.passages())
    assert store.verify().problems == ()


def test_a_path_that_is_no_bundle_is_refused(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("absent", "file", "folder", "kb"):
        with pytest.raises(SourceError, match="exported bank"):
            store.import_(tmp_path / name)
    assert store.batches() == []


def test_a_bundle_of_other_models_is_refused(
    bundle: Path, open_store: Open, tiny_models: ModelConfig, tiny_pooled_dir: Path
) -> None:
    store = open_store(models=replace(tiny_models, hypernetwork=str(tiny_pooled_dir)))
    with pytest.raises(FingerprintError, match="hypernetwork"):
        store.import_(bundle)
    _other_manifest(bundle, fingerprints=store.models.fingerprints)
    with pytest.raises(FingerprintError):
        store.import_(bundle)
    assert (store.passages(), store.verify().problems) == ([], ())
