"""Export and import of a bank: passages with their vectors, and experts as they are stored, as Parquet files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from knowstore._checks import checked_passages
from knowstore._loaded import LoadedModels
from knowstore.bank import EncodedExpert, ExpertBank
from knowstore.errors import (
    BankError,
    ConfigError,
    FingerprintError,
    KnowledgeStoreError,
    PassageError,
    SourceError,
)
from knowstore.passages import PassageRow, PassageTable
from knowstore.records import Passage
from knowstore.sources import leaf_columns, read_batches

_FORMAT = 1
_MANIFEST = "manifest.json"
PROBES_FILE = "probes.jsonl"
_UNFINISHED = "manifest.json.part"  # there from the first file of an export until the manifest takes its place
_FILES = ("passages.parquet", "experts.parquet", "sources.parquet", PROBES_FILE, _UNFINISHED)
_ROWS = 256  # rows in memory
_PASSAGE_COLUMNS = ("id", "text", "title", "source", "date", "vector", "segments", "segment_vectors")
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_PLACEMENTS = 5_000_000  # in memory
_UNIT_NORM = 0.01  # how far vectors of length 1 may be from it; half precision errs by a tenth of that


def export(
    folder: Path,
    head: int,
    pairs: Sequence[tuple[str, str]],
    table: PassageTable,
    bank: ExpertBank,
    fingerprints: dict[str, str],
    probes: str | None,
) -> int:
    """Write the placements `pairs`, live at `head`, and the rows of `probes` to `folder`; see `KnowledgeStore.export`.
    The manifest comes last: what has none is no bundle."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    is_cut_short = _UNFINISHED in found and found <= set(_FILES)
    if (found and not is_cut_short) or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is not an empty folder", kept="it is as it was", fix="name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with _emptied_on_failure(folder), ExitStack() as opened:  # files, for Arrow reads some paths as URLs
        _empty(folder)
        (folder / _UNFINISHED).touch()
        ids = {passage_id for passage_id, _ in pairs}
        missing = {"passages": set(ids), "experts": set(ids)}
        writer = None
        for batch in table.iter_rows(at=head, columns=_PASSAGE_COLUMNS):
            if writer is None:
                file = opened.enter_context((folder / "passages.parquet").open("wb"))
                writer = opened.enter_context(pq.ParquetWriter(file, batch.schema))
            writer.write_batch(batch)
            missing["passages"].difference_update(batch.column("id").to_pylist())
        schema = pa.schema(
            [
                ("passage_id", pa.string()), ("fingerprint", pa.string()), ("codec", pa.string()),
                ("form", pa.string()), ("rank", pa.int32()), ("segment_ranks", pa.list_(pa.int32())),
                ("data", pa.large_binary()), ("checksum", pa.string()), ("batch_id", pa.int64()),
            ]
        )  # fmt: skip
        with (folder / "experts.parquet").open("wb") as file, pq.ParquetWriter(file, schema) as experts:
            part: list[dict[str, object]] = []
            for expert in bank.iter_encoded():
                if expert.passage_id in ids:
                    expert.check()
                    part.append(asdict(expert))
                    missing["experts"].discard(expert.passage_id)
                if len(part) >= _ROWS:
                    experts.write_table(pa.Table.from_pylist(part, schema=schema))
                    part = []
            experts.write_table(pa.Table.from_pylist(part, schema=schema))
        if gaps := [f"{len(some)} {name}" for name, some in missing.items() if some]:
            raise PassageError(
                f"the store is damaged: {' and '.join(gaps)} are missing",
                kept="the store is as it was, and nothing was exported",
                fix="run `knowstore verify --repair`, then export again",
            )
        schema = pa.schema([("passage_id", pa.string()), ("source", pa.string())])
        sources = {"passage_id": [passage_id for passage_id, _ in pairs], "source": [source for _, source in pairs]}
        with (folder / "sources.parquet").open("wb") as file:
            pq.write_table(pa.table(sources, schema=schema), file)
        manifest: dict[str, object] = {"format": _FORMAT, "fingerprints": fingerprints, "passages": len(ids)}
        if probes is not None:
            (folder / PROBES_FILE).write_text(probes, "utf-8")
            manifest["probes"] = PROBES_FILE
        (folder / _UNFINISHED).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    (folder / _UNFINISHED).replace(folder / _MANIFEST)
    return len(ids)


@contextmanager
def _emptied_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _empty(folder)
        raise


def _empty(folder: Path) -> None:
    """Delete what an export wrote that was not finished; what tells that it was one goes last."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Bundle:
    """An exported bank."""

    folder: Path
    fingerprints: dict[str, str]

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Read the manifest; see `KnowledgeStore.import_` for what is raised."""
        path = folder / _MANIFEST
        try:
            _check_regular(path)
            if path.stat().st_size > _MAX_MANIFEST_BYTES:
                raise ValueError(f"larger than {_MAX_MANIFEST_BYTES} bytes")
            manifest = json.loads(path.read_text("utf-8"))
            if manifest["format"] != _FORMAT:
                raise ValueError(f"format {manifest['format']}, expected {_FORMAT}")
            if manifest.get("probes") is not None and not (folder / PROBES_FILE).is_file():
                raise ValueError(f"it names {PROBES_FILE}, which is not there")
            return cls(folder, {str(key): str(value) for key, value in manifest["fingerprints"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, error) from error

    def check(self, fingerprints: dict[str, str]) -> None:
        """Raise FingerprintError when the experts or vectors were made by other models."""
        other = [name for name, digest in fingerprints.items() if self.fingerprints.get(name) != digest]
        if other:
            raise FingerprintError(
                f"the bank in {self.folder} was made with another {', '.join(other)}",
                kept="the store is as it was",
                fix="import it into a store with the same models, or ingest the passages' sources",
            )

    def pairs(self) -> list[tuple[str, str]]:
        """Placements (passage_id, source)."""
        path = self.folder / "sources.parquet"
        pairs: dict[tuple[str, str], None] = {}
        for part in self._parts(path.name, ("passage_id", "source")):
            pairs.update(((row["passage_id"], row["source"]), None) for row in part)
            if len(pairs) > _MAX_PLACEMENTS:
                raise _damaged(path, ValueError(f"it places passages more than {_MAX_PLACEMENTS:,} times"))
        if not all(isinstance(value, str) for pair in pairs for value in pair):
            raise _damaged(path, ValueError("a passage has no source"))
        return list(pairs)

    def write(
        self,
        wanted: set[str],
        pairs: Sequence[tuple[str, str]],
        table: PassageTable,
        bank: ExpertBank,
        batch_id: int,
        models: LoadedModels,
    ) -> None:
        """Write the rows of `wanted`, placed as `pairs` say, into a staged batch; of every row it is verified that it
        can be used."""
        sources: dict[str, list[str]] = {}
        for passage_id, source in pairs:
            sources.setdefault(passage_id, []).append(source)
        n_segments: dict[str, int] = {}
        bank.add_encoded(self._experts(wanted, bank, models, n_segments), batch_id)
        missing = wanted - bank.existing(wanted)
        if missing:
            raise _damaged(self.folder / "experts.parquet", ValueError(f"{len(missing)} experts are missing"))
        missing = set(wanted)
        for rows in self._passages(missing, n_segments, is_unit=models.has_unit_vectors):
            try:
                table.add([_placed(row, sources[row.passage.passage_id]) for row in rows], batch_id)
            except PassageError as error:
                raise _damaged(self.folder / "passages.parquet", error) from error
            missing -= {row.passage.passage_id for row in rows}
        if missing:
            raise _damaged(self.folder / "passages.parquet", ValueError(f"{len(missing)} passages are missing"))

    def _experts(
        self, wanted: set[str], bank: ExpertBank, models: LoadedModels, n_segments: dict[str, int]
    ) -> Iterator[EncodedExpert]:
        """Those of `wanted` that `bank` can use; notes how many segments each has."""
        path = self.folder / "experts.parquet"
        names = tuple(field.name for field in fields(EncodedExpert))
        for part in self._parts(path.name, names):
            for raw in part:
                if raw["passage_id"] not in wanted:
                    continue
                if any(value is None for value in raw.values()):
                    raise _damaged(path, ValueError(f"the expert of passage {raw['passage_id']} is not complete"))
                expert = EncodedExpert(**(raw | {"segment_ranks": tuple(raw["segment_ranks"])}))
                try:
                    bank.check(expert, models.expert_shape)
                except FingerprintError:
                    raise
                except BankError as error:
                    raise _damaged(path, error) from error
                n_segments[expert.passage_id] = len(expert.segment_ranks)
                yield expert

    def _passages(self, wanted: set[str], n_segments: dict[str, int], *, is_unit: bool) -> Iterator[list[PassageRow]]:
        """Those of `wanted` that can be stored, `n_segments` being how many their experts have."""
        path = self.folder / "passages.parquet"
        for part in self._parts(path.name, _PASSAGE_COLUMNS):
            try:
                rows = [_row(raw, n_segments.get(raw["id"], 0)) for raw in part if raw["id"] in wanted]
                if is_unit and rows:
                    _check_lengths(rows)
            except (ValueError, TypeError, IndexError, PassageError) as error:
                raise _damaged(path, error) from error
            yield rows

    def _parts(self, name: str, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """Rows of a file, some at a time."""
        try:
            _check_regular(self.folder / name)
            with (self.folder / name).open("rb") as file, pq.ParquetFile(file, pre_buffer=False) as table:
                _check_types(table.schema_arrow, columns)
                leaves = leaf_columns(table, columns, with_lists=True)
                for batch in read_batches(table, file, leaves, max_rows=_ROWS):
                    yield batch.to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.folder / name, error) from error


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_list(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)


_TYPES: dict[str, Callable[[pa.DataType], bool]] = {
    "vector": lambda kind: _is_list(kind) and pa.types.is_floating(kind.value_type),
    "segments": lambda kind: _is_list(kind) and pa.types.is_integer(kind.value_type),
    "segment_ranks": lambda kind: _is_list(kind) and pa.types.is_integer(kind.value_type),
    "segment_vectors": _is_binary,
    "data": _is_binary,
    "rank": pa.types.is_integer,
    "batch_id": pa.types.is_integer,
}


def _check_types(schema: pa.Schema, columns: Sequence[str]) -> None:
    """Raise ValueError for a column that is not there or is of another type than an export writes; the rest is text."""
    for name in columns:
        if name not in schema.names:
            raise ValueError(f"it has no column {name}")
        kind = schema.field(name).type
        if not _TYPES.get(name, _is_text)(kind):
            raise ValueError(f"its column {name} is of type {kind}")


def _check_regular(path: Path) -> None:
    """Raise OSError for what a read would wait on for ever, such as a pipe."""
    if path.exists() and not path.is_file():
        raise OSError("it is no regular file")


def _row(raw: dict[str, Any], n_expert_segments: int) -> PassageRow:
    """A passage as it was exported; ValueError, TypeError or PassageError when it is damaged."""
    vector = np.asarray(raw["vector"], np.float32)
    segments = raw["segments"]
    halves = np.frombuffer(raw["segment_vectors"], np.float16).reshape(len(segments) // 2, vector.shape[0])
    vectors = halves.astype(np.float32)
    (passage,) = checked_passages([Passage(*(raw[name] or "" for name in ("text", "title", "source", "date")))])
    if passage.passage_id != raw["id"]:
        raise ValueError(f"passage {passage.title!r} is not what its id says")
    if max(len(segments) // 2, n_expert_segments) > len(passage.text):
        raise ValueError(f"passage {passage.title!r} has more sentences than characters")
    return PassageRow(passage, vector, list(zip(segments[::2], segments[1::2], strict=True)), vectors)


def _placed(row: PassageRow, sources: Sequence[str]) -> PassageRow:
    """The row from one of its passage's sources: the one that it names may have given it up just before the export."""
    return row if row.passage.source in sources else replace(row, passage=replace(row.passage, source=sources[0]))


def _check_lengths(rows: Sequence[PassageRow]) -> None:
    """Raise ValueError unless all vectors have length 1."""
    vectors = np.concatenate([part for row in rows for part in (row.vector[None], row.segment_vectors)])
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    if not (abs(lengths - 1) <= _UNIT_NORM).all():
        raise ValueError("a vector is not of length 1, as the store's retriever makes them")


def _damaged(path: Path, error: Exception) -> SourceError:
    why = error.what if isinstance(error, KnowledgeStoreError) else error
    return SourceError(
        f"{path} is not part of an exported bank: {why}",
        kept="the store is as it was",
        fix="export the bank again",
    )
