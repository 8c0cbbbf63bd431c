"""Export and import of a bank, and bundles that are damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save

from knowstore.bank import EncodedExpert, encode
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
    codec = BankConfig(codec="float16")
    with KnowledgeStore.open(folder / "origin", models=tiny_models, bank=codec, cache_dir=cache_dir) as store:
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


@pytest.mark.parametrize("name", [b"not-utf-8-\xff", b"s3:bucket", b"file:x", b"a%20b"])
def test_a_bank_is_exported_to_a_folder_of_any_name(
    name: bytes, exported: Path, open_store: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(os.fsdecode(name))
    assert open_store(exported / "origin").export(folder) == 4
    assert {file.name for file in folder.iterdir()} == {file.name for file in (exported / "bundle").iterdir()}
    assert open_store().import_(folder).passages_added == 4


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


_KILLED_AT = {
    "passages": "pq.ParquetWriter.close = kill",
    "sources": "pq.write_table = kill",
    "probes": "Path.write_text = kill",
    "manifest": "Path.replace = kill",
}


@pytest.mark.parametrize("at", _KILLED_AT)
def test_an_export_that_is_killed_is_no_bundle_and_is_begun_anew(
    at: str,
    open_store: Open,
    facts: list[Passage],
    tmp_path: Path,
    start_python: Callable[..., subprocess.Popen[str]],
) -> None:
    store = open_store()
    store.add(facts[:2])
    killed = start_python(
        "import pyarrow.parquet as pq\n"
        "def kill(*_, **__):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{_KILLED_AT[at]}\n"
        "store.export(Path(sys.argv[1]), probes=lambda: 'a probe')\n",
        str(tmp_path / "bundle"),
    )
    _, said = killed.communicate(timeout=240)
    assert killed.returncode == -signal.SIGKILL, said
    assert any((tmp_path / "bundle").iterdir())
    with pytest.raises(SourceError, match="exported bank"):
        open_store("copy").import_(tmp_path / "bundle")
    assert store.export(tmp_path / "bundle") == 2
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {
        "experts.parquet", "manifest.json", "passages.parquet", "sources.parquet",
    }  # fmt: skip
    assert open_store("copy").import_(tmp_path / "bundle").passages_added == 2


def test_a_folder_with_files_of_somebody_else_is_never_emptied(
    exported: Path, open_store: Open, tmp_path: Path
) -> None:
    for names in (["passages.parquet"], ["probes.jsonl"], ["manifest.json.part", "notes.txt"]):
        folder = tmp_path / names[-1]
        folder.mkdir()
        for name in names:
            (folder / name).write_text("mine")
        with pytest.raises(ConfigError, match="empty folder"):
            open_store(exported / "origin").export(folder)
        assert sorted(path.name for path in folder.iterdir()) == names


def test_probes_of_a_bundle_are_of_its_state_and_are_missed(
    open_store: Open, facts: list[Passage], tmp_path: Path
) -> None:
    store, other = open_store(), open_store()
    store.add(facts[:1])

    def probes() -> str:
        if len(store.passages()) == 1:
            other.add(facts[1:2])
            return "of the state before"
        return "of this state"

    assert store.export(tmp_path / "bundle", probes=probes) == 2
    assert (tmp_path / "bundle" / "probes.jsonl").read_text() == "of this state"
    (tmp_path / "bundle" / "probes.jsonl").unlink()
    copy = open_store("copy")
    with pytest.raises(SourceError, match=r"names probes\.jsonl, which is not there"):
        copy.import_(tmp_path / "bundle")
    assert copy.passages() == []


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


def _forge(bundle: Path, change: Callable[[EncodedExpert], EncodedExpert]) -> None:
    """Change experts and seal them anew, as whoever wrote the bundle can."""
    path = bundle / "experts.parquet"
    table = pq.read_table(path)
    rows = []
    for row in table.to_pylist():
        changed = change(EncodedExpert(**(row | {"segment_ranks": tuple(row["segment_ranks"])})))
        rows.append(asdict(replace(changed, checksum=changed.seal())))
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def _nines(rows: list[object]) -> list[object]:
    return [np.full(len(row) // 2, 9, np.float16).tobytes() for row in rows if isinstance(row, bytes)]


def _of(change: Callable[[str, np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Puts other tensors in the place of an expert's."""

    def tensors(expert: EncodedExpert) -> dict[str, np.ndarray]:
        return {name: change(name, tensor) for name, tensor in expert.decode().tensors.items()}

    return lambda bundle: _forge(bundle, lambda expert: replace(expert, data=encode(tensors(expert), "float32")))


def _latent(**changes: object) -> Callable[[Path], None]:
    """Puts a latent in an expert's place, of the shape that the tiny `tokens` hypernetwork makes but for `changes`."""

    def forged(expert: EncodedExpert) -> EncodedExpert:
        rank = expert.rank
        arrays = {"code": np.ones((rank, 8), np.float32), "ids": np.ones(rank, int), "before": np.array([-1])} | changes
        return replace(expert, form="latent", codec="latent", data=encode(arrays, "latent"))

    return lambda bundle: _forge(bundle, forged)


def _wider(_: str, tensor: np.ndarray) -> np.ndarray:
    """Of 32 more columns or rows, whichever are the LLM's width."""
    return np.pad(tensor, [(0, 32 if size == 32 else 0) for size in tensor.shape])


def _not_finite(expert: EncodedExpert) -> EncodedExpert:
    tensors = {name: np.full_like(tensor, np.nan) for name, tensor in expert.decode().tensors.items()}
    return replace(expert, data=save(tensors))


def _latent_not_finite(expert: EncodedExpert) -> EncodedExpert:
    ids, before = np.ones(expert.rank, np.int32), np.array([-1], np.int32)
    data = save({"code": np.full((expert.rank, 8), np.nan, np.float32), "ids": ids, "before": before})
    return replace(expert, form="latent", codec="latent", data=data)


def _as_factors(expert: EncodedExpert) -> EncodedExpert:
    up, down = np.ones((32, expert.rank), np.float32), np.ones((expert.rank, 32), np.float32)
    data = encode({"up1": up, "up2": down, "dw1": up, "dw2": down}, "float32")
    return replace(expert, form="factors", segment_ranks=(expert.rank,), data=data)


def _of_many_neurons(expert: EncodedExpert) -> EncodedExpert:
    rank = 129  # the tiny hypernetwork reads 128 tokens
    data = encode({"up": np.ones((32, rank), np.float32), "down": np.ones((rank, 32), np.float32)}, "float32")
    return replace(expert, rank=rank, segment_ranks=(rank,), data=data)


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
    "data that are no expert": lambda b: _forge(b, lambda expert: replace(expert, data=b"oops")),
    "tensors that are not finite": lambda b: _forge(b, _not_finite),
    "experts for another width": _of(_wider),
    "experts of another form": lambda b: _forge(b, _as_factors),
    "a form that is none": lambda b: _forge(b, lambda expert: replace(expert, form="oops")),  # type: ignore[arg-type]
    "a codec that is none": lambda b: _forge(b, lambda expert: replace(expert, codec="oops")),  # type: ignore[arg-type]
    "a rank of other tensors": lambda b: _forge(b, lambda expert: replace(expert, rank=10**6)),
    "more neurons than are made": lambda b: _forge(b, _of_many_neurons),
    "no segments": lambda b: _forge(b, lambda expert: replace(expert, segment_ranks=())),
    "segments without end": lambda b: _forge(
        b, lambda expert: replace(expert, segment_ranks=(*[0] * 1000, expert.rank))
    ),
    "latents that are not finite": lambda b: _forge(b, _latent_not_finite),
    "latents without a code": _latent(code=np.ones(3, np.float32)),
    "latents with other arrays": _latent(more=np.ones(1, np.float32)),
    "latents of words that there are none of": _latent(before=np.array([10**6])),
    "latents of words below zero": _latent(before=np.array([-2])),
    "dates that are none": lambda b: _rewrite(b / "passages.parquet", date=lambda days: ["\x1b[2J now"] * len(days)),
    "vectors of any length": lambda b: _rewrite(b / "passages.parquet", vector=lambda rows: [[1e30] * 32] * len(rows)),
    "sentence vectors of any length": lambda b: _rewrite(b / "passages.parquet", segment_vectors=_nines),
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


def test_a_passage_of_another_source_than_it_is_placed_in_is_from_where_it_is_placed(
    bundle: Path, open_store: Open
) -> None:
    _rewrite(bundle / "passages.parquet", source=lambda sources: ["another"] * len(sources))
    store = open_store()
    store.import_(bundle)
    assert store.verify().problems == ()
    assert {one.passage.source for one in store.passages()} <= {source for source, _ in store.catalog.sources()}


def test_latents_are_imported_and_one_that_cannot_be_mounted_is_not(
    bundle: Path, open_store: Open, facts: list[Passage], tmp_path: Path
) -> None:
    _latent()(bundle)
    assert open_store("forged").import_(bundle).passages_added == 4
    store = open_store("latents", bank=BankConfig(codec="latent"))
    store.add(facts[:4])
    store.export(tmp_path / "latents-bundle")
    copy = open_store("copy")
    assert copy.import_(tmp_path / "latents-bundle").passages_added == 4
    assert (len(copy.ask("When was Rome founded?").experts), copy.verify().problems) == (4, ())


FORGERIES_OF_FACTORS: dict[str, Callable[[EncodedExpert], EncodedExpert]] = {
    "a latent without its array": lambda expert: replace(
        expert, form="latent", codec="latent", data=encode({"x": np.ones(5, np.float32)}, "latent")
    ),
    "two segments": lambda expert: replace(expert, segment_ranks=(1, 2)),
    "another rank": lambda expert: replace(_as_factors(replace(expert, rank=4)), rank=4),
    "another form": lambda expert: replace(_of_many_neurons(expert), form="neurons"),
}


@pytest.mark.parametrize("forgery", FORGERIES_OF_FACTORS)
def test_experts_that_the_paper_s_hypernetwork_cannot_have_made_are_refused(
    forgery: str, open_store: Open, facts: list[Passage], pooled: ModelConfig, tmp_path: Path
) -> None:
    store = open_store("origin", models=pooled, bank=BankConfig(codec="float16"))
    store.add(facts[:4])
    store.export(tmp_path / "bundle")
    copy = open_store(models=pooled)
    assert copy.import_(tmp_path / "bundle").passages_added == 4
    copy.rollback(1)
    _forge(tmp_path / "bundle", FORGERIES_OF_FACTORS[forgery])
    with pytest.raises(SourceError, match="hypernetwork"):
        open_store("other", models=pooled).import_(tmp_path / "bundle")


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
