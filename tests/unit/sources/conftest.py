from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest

from knowstore.config import SplitConfig
from knowstore.errors import SourceError
from knowstore.records import Passage, SourceFailure
from knowstore.sources import ColumnMap, Source, read_passages


@dataclass(frozen=True)
class Reading:
    """What reading one source gave: passages, bad rows, and the error that ended it."""

    passages: list[Passage]
    failures: list[SourceFailure]
    error: SourceError | None

    @property
    def texts(self) -> list[str]:
        return [passage.text for passage in self.passages]


@pytest.fixture
def read() -> Callable[..., Reading]:
    def read_one(
        path: Path | None, columns: ColumnMap | None = None, max_bytes: int = 1 << 24, stdin: BinaryIO | None = None
    ) -> Reading:
        source = Source("-", None) if path is None else Source(path.as_posix(), path)
        passages: list[Passage] = []
        failures: list[SourceFailure] = []
        error = None
        split = SplitConfig(max_file_bytes=max_bytes)
        try:
            passages.extend(
                read_passages(source, split=split, columns=columns, on_failure=failures.append, stdin=stdin)
            )
        except SourceError as raised:
            error = raised
        return Reading(passages, failures, error)

    return read_one


@pytest.fixture
def make_pdf() -> Callable[..., bytes]:
    def make(lines: list[str], title: str = "", password: str = "") -> bytes:
        pypdf = pytest.importorskip("pypdf")
        from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

        writer = pypdf.PdfWriter()
        page = writer.add_blank_page(width=600, height=800)
        if lines:
            names = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica", "/Encoding": "/WinAnsiEncoding"}
            font = DictionaryObject({NameObject(key): NameObject(value) for key, value in names.items()})
            fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
            page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
            content = DecodedStreamObject()
            shown = " ".join(f"({line}) Tj 0 -20 Td" for line in lines)
            content.set_data(f"BT /F1 12 Tf 50 700 Td {shown} ET".encode())
            page[NameObject("/Contents")] = writer._add_object(content)
        if title:
            writer.add_metadata({"/Title": title})
        if password:
            writer.encrypt(password, algorithm="RC4-128")
        stream = io.BytesIO()
        writer.write(stream)
        return stream.getvalue()

    return make
