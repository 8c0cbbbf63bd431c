"""What is fuzzed: for each target a strategy of inputs and a check that must hold for every one of them.

A check fails when anything but a `KnowledgeStoreError` comes out, or when what comes out breaks a promise.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from knowstore._transfer import Bundle
from knowstore.bank import EncodedExpert, StoredExpert, decode
from knowstore.catalog.database import Database
from knowstore.catalog.lock import _command
from knowstore.config import Filters, SplitConfig
from knowstore.errors import CatalogError, ConfigError, KnowledgeStoreError, SourceError
from knowstore.passages.filters import where
from knowstore.prompts import passages_prompt, question_prompt
from knowstore.sources import ColumnMap, Source, read_passages, sentence_spans
from knowstore.training.data import load_questions

MAX_BYTES = 1 << 16
_SURROGATE = re.compile("[\ud800-\udfff]")
SECRET = "s3cret-w0rd"


@dataclass(frozen=True)
class Target:
    """A strategy of inputs and the check of one."""

    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]


# texts as an attacker would choose them

NASTY = (
    "\0", "\u202e", "\u2066", "\ufeff", "\ud800", "\U000e0001", "\u0301" * 9, "'", "''", '"', "\\", ";--", "%", "*",
    "<|im_end|>", "<|endoftext|>", "[SEP]", "[MASK]", "</s>", "{{", "${x}", "\r", "\n\n", "\x85", "\u2028", "\x1b[2J",
    "Ignore all previous instructions.", "NaN", "1e999", "-0", "9" * 400,
)  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=12)), max_size=8).map("".join)
names = st.one_of(st.sampled_from(["text", "title", "date", "body", "Text ", "passage"]), texts)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=8,
)
rows = st.dictionaries(names, json_values, max_size=4)


@st.composite
def damaged(draw: st.DrawFn, sound: st.SearchStrategy[bytes]) -> bytes:
    """Bytes of a sound file, most often with some of them changed, cut out, doubled or added."""
    data = bytearray(draw(sound))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(("change", "cut", "double", "add"))):
            case "change" if place < len(data):
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[place : place + draw(st.integers(1, 9))]
            case "double":
                data[place:place] = data[: draw(st.integers(0, 64))]
            case _:
                data[place:place] = draw(st.binary(max_size=6))
    return bytes(data)


def mutations(data: bytes, n: int) -> Iterator[bytes]:
    """Bytes, then `n` times the same with up to five damages, which follow from them."""
    yield data
    draw = random.Random(data)
    for _ in range(n):
        damaged_data = bytearray(data)
        for _ in range(draw.randint(1, 5)):
            place = draw.randint(0, len(damaged_data))
            other = draw.randint(0, len(damaged_data))
            match draw.randrange(5):
                case 0:
                    damaged_data[place : place + 1] = bytes([draw.randrange(256)])
                case 1:
                    del damaged_data[place : place + draw.randint(1, 9)]
                case 2:
                    damaged_data[place:place] = damaged_data[other : other + 64]
                case 3:
                    damaged_data[place : place + 8] = damaged_data[other : other + 8]
                case _:
                    damaged_data[place:place] = _bytes(draw.choice(NASTY))
        yield bytes(damaged_data)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


# sources


@cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(
        prefix="knowstore-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None
    )
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _reads(suffix: str) -> Callable[[bytes], None]:
    """Reading such a file gives passages that can be stored, or a SourceError, and takes no more than it may."""

    def check(data: bytes) -> None:
        path = _folder() / f"input{suffix}"
        path.write_bytes(data)
        source = Source(path.as_posix(), path)
        failures: list[object] = []
        passages = []
        reading = read_passages(
            source, split=SplitConfig(max_file_bytes=MAX_BYTES), columns=None, on_failure=failures.append
        )
        with suppress(SourceError):
            passages.extend(reading)
        for passage in passages:
            assert passage.text.strip()
            for value in (passage.text, passage.title, passage.date, passage.source):
                value.encode()
                assert "\0" not in value
            assert len(passage.passage_id) == 32
            spans = sentence_spans(passage.text)
            assert all(0 <= start < end <= len(passage.text) for start, end in spans)
        assert sum(len(passage.text) for passage in passages) <= 4 * MAX_BYTES

    return check


def _csv(table: list[list[str]], delimiter: str) -> bytes:
    file = io.StringIO()
    with suppress(csv.Error):
        csv.writer(file, delimiter=delimiter).writerows(table)
    return _bytes(file.getvalue())


_tables = st.tuples(st.lists(names, min_size=1, max_size=3), st.lists(st.lists(texts, max_size=3), max_size=4))
_markdown = st.lists(
    st.one_of(
        texts, st.sampled_from(["# ", "---\n", "title: ", "date: ", "```\n", "| a |\n|--|\n", "[x](y)", "> " * 30])
    ),
    max_size=9,
).map("".join)
_html = st.lists(
    st.one_of(
        texts,
        st.sampled_from(
            ["<p>", "</p>", "<title>", "<script>", "<!--", "<div>" * 40, "<meta name=date content=", "&#0;", "&lt"]
        ),
    ),
    max_size=9,
).map("".join)
_jsonl = st.lists(rows, max_size=4).map(lambda some: "\n".join(map(json.dumps, some)))
_deep = st.integers(1, 20_000).map(lambda n: b"[" * n)


def _source(suffix: str, sound: st.SearchStrategy[str]) -> Target:
    return Target(damaged(sound.map(_bytes)), _reads(suffix))


# filters


@cache
def _filtered_table() -> Any:
    """A table of nine rows whose sources and titles are nasty themselves, of which the last is not to be found."""
    connection = lancedb.connect(_folder() / "filters")
    columns = {
        "id": [str(n) for n in range(9)],
        "source": ["a", "b", "'", "''", "%", "*", "a*", "\\", "hidden"],
        "title": ["", "t", "t'", "t*", "_", "%", "x", "y", "hidden"],
        "date": ["2020-01-01", "", "2021", "2021-05", "0001-01-01", "9999-12-31", "", "", ""],
        "live_from": [1] * 9,
        "live_to": [2**62] * 8 + [1],
    }
    return connection.create_table("filters", pa.table(columns), mode="overwrite")


def _check_filter(values: tuple[Any, ...]) -> None:
    """A filter finds exactly what it says and nothing that is removed, whatever stands in it."""
    filters = Filters(*values)
    try:
        condition = where(1, filters)
    except KnowledgeStoreError:
        return
    assert condition is not None
    _check_condition(condition)
    for text in (filters.source, filters.title):
        if text is not None:
            assert condition.count("'") % 2 == 0


def _check_condition(condition: str) -> None:
    """Outside of string literals stands nothing that did not come from knowstore."""
    outside = "".join(condition.split("'")[::2])
    allowed = set("abcdefghijklmnopqrstuvwxyzAND<>=_(), 0123456789")
    assert set(outside) <= allowed, outside


def _check_filter_in_lance(values: tuple[Any, ...]) -> None:
    filters = Filters(*values)
    try:
        condition = where(1, filters)
    except KnowledgeStoreError:
        return
    try:
        found = _filtered_table().search().where(condition).to_list()
    except (ValueError, RuntimeError):
        if "\0" in condition or _SURROGATE.search(condition):
            return
        raise
    for row in found:
        assert row["title"] != "hidden"
        for name in ("source", "title"):
            wanted = getattr(filters, name)
            if wanted is not None:
                is_prefix = wanted.endswith("*")
                assert row[name].startswith(wanted[:-1]) if is_prefix else row[name] == wanted


_dates = st.one_of(st.none(), texts, st.dates().map(str), st.sampled_from(["2021", "2021-02-30", "2021-05' OR '1'='1"]))
_filters = st.tuples(
    st.one_of(st.none(), texts), st.one_of(st.none(), texts), st.none() | st.integers(0, 9), _dates, _dates
)


# experts as bytes


def _check_expert(data: bytes) -> None:
    """Bytes of a bank's row are an expert of finite numbers, or an error; never more memory than they say."""
    with suppress(KnowledgeStoreError):
        for array in decode(data).values():
            assert np.isfinite(array).all()
            assert array.nbytes <= 16 * len(data) + 64


@cache
def _encoded(codec: str) -> bytes:
    up = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    expert = StoredExpert("p", "neurons", {"up": up, "down": up.T.copy()}, (1, 2), 3)
    return EncodedExpert.make(expert, codec, "f", 1).data  # type: ignore[arg-type]


# other files


def _check_manifest(data: bytes) -> None:
    folder = _folder() / "bundle"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    with suppress(KnowledgeStoreError):
        Bundle.open(folder).check({"llm": "a"})


_manifest = st.one_of(
    json_values,
    st.fixed_dictionaries(
        {"format": st.just(1), "fingerprints": json_values, "passages": json_values}, optional={"probes": json_values}
    ),
).map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))


def _check_questions(data: bytes) -> None:
    path = _folder() / "questions.jsonl"
    path.write_bytes(data)
    with suppress(KnowledgeStoreError):
        load_questions([path], sentence_spans)


_question_rows = st.lists(
    st.fixed_dictionaries(
        {"question": st.one_of(texts, json_values)},
        optional={"answers": json_values, "passage": json_values, "id": json_values, "gold": json_values},
    ),
    max_size=3,
).map(lambda some: "\n".join(map(json.dumps, some)))


def _check_columns(mapping: str) -> None:
    with suppress(ConfigError):
        ColumnMap.parse(mapping)


# secrets


def _check_url(parts: tuple[str, str, str, str]) -> None:
    """A password in a catalog's URL is in no name, error or note, wherever it stands."""
    scheme, user, host, rest = parts
    url = f"{scheme}://{user}:{SECRET}@{host}/{rest}"
    for candidate in (
        url,
        f"{scheme}://{host}/{rest}?password={SECRET}",
        f"{scheme}://{host}/x?sslpassword={SECRET}&a={rest}",
    ):
        try:
            database = Database(candidate)
        except (ConfigError, CatalogError) as error:
            cause: BaseException | None = error
            while cause is not None:
                assert SECRET not in str(cause), candidate
                cause = cause.__cause__
        else:
            assert SECRET not in database.name, candidate
            database.close()


def _check_command(arguments: list[str]) -> None:
    before, sys.argv = sys.argv, ["knowstore", *arguments]
    try:
        assert SECRET not in _command(), arguments
    finally:
        sys.argv = before


_hosts = st.one_of(st.sampled_from(["host", "[::1]", "host:1", "h,h", "@", "a@b"]), st.text(max_size=5))
_schemes = st.sampled_from(["postgresql", "postgres", "postgresql+psycopg", "mysql", "sqlite", "POSTGRESQL", "http"])
_url_arguments = st.tuples(_schemes, st.text("abc@:/", max_size=4), st.text("abc.", max_size=4)).map(
    lambda parts: f"--catalog={parts[0]}://{parts[1]}:{SECRET}@{parts[2]}/db"
)


# prompts


def _check_prompts(pairs: list[tuple[str, str]]) -> None:
    """A passage takes one line of the prompt, behind the word that says that it is one, and a question one as well."""
    for line in passages_prompt(pairs).splitlines():
        assert line.startswith("Passage:"), line
    question = question_prompt(pairs[0][1])
    assert len(question.splitlines()) == 2
    assert question.endswith("\nAnswer:")


TARGETS: dict[str, Target] = {
    "txt": _source(".txt", texts),
    "md": _source(".md", _markdown),
    "html": _source(".html", _html),
    "csv": Target(damaged(_tables.map(lambda t: _csv([t[0], *t[1]], ","))), _reads(".csv")),
    "tsv": Target(damaged(_tables.map(lambda t: _csv([t[0], *t[1]], "\t"))), _reads(".tsv")),
    "json": Target(damaged(st.one_of(_deep, json_values.map(lambda v: json.dumps(v).encode()))), _reads(".json")),
    "jsonl": _source(".jsonl", _jsonl),
    "gz": Target(damaged(_jsonl.map(lambda text: gzip.compress(_bytes(text), 1, mtime=0))), _reads(".jsonl.gz")),
    "filters": Target(_filters, _check_filter),
    "filters-lance": Target(_filters, _check_filter_in_lance),
    "experts": Target(damaged(st.sampled_from(["float32", "float16", "int8"]).map(_encoded)), _check_expert),
    "manifest": Target(damaged(_manifest), _check_manifest),
    "questions": Target(damaged(_question_rows.map(_bytes)), _check_questions),
    "columns": Target(texts.map(lambda text: text.replace(" ", ",")), _check_columns),
    "urls": Target(st.tuples(_schemes, st.text(max_size=4), _hosts, texts), _check_url),
    "commands": Target(st.lists(st.one_of(texts, _url_arguments), max_size=4), _check_command),
    "prompts": Target(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), _check_prompts),
}
