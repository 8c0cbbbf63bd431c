"""Small files that would take gigabytes if they were read without a look at what they grow to:

    python -m tests.resources.bombs

Reads each and prints a JSON object a line: its name, its bytes, what reading it said, and by how many bytes the peak of
the resident memory rose (`grown_mb`).
"""

from __future__ import annotations

import gc
import gzip
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from knowstore.audits import read_probes
from knowstore.config import SplitConfig
from knowstore.errors import SourceError
from knowstore.sources import Source, read_passages

_N_PASSAGES = 300


def parquet(column: pa.Array, **options: object) -> bytes:
    """A file with one column of texts, compressed."""
    out = io.BytesIO()
    pq.write_table(pa.table({"text": column}), out, compression="zstd", **options)
    return out.getvalue()


def _same_text(n_chars: int, n_rows: int) -> pa.Array:
    """One text in a dictionary, which stands for many rows."""
    return pa.DictionaryArray.from_arrays(
        pa.repeat(pa.scalar(0, pa.int32()), n_rows), pa.array(["word " * (n_chars // 5)])
    )


def _lists(n_values: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, n_values], pa.int32()), pa.nulls(n_values, pa.string()))


def _docx(document_xml: Callable[[str], str]) -> bytes:
    """A Word file whose text was changed."""
    import docx

    plain, changed = io.BytesIO(), io.BytesIO()
    document = docx.Document()
    document.add_table(1, 2).cell(0, 0).text = "cell"
    document.save(plain)
    with zipfile.ZipFile(plain) as before, zipfile.ZipFile(changed, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            data = before.read(name)
            after.writestr(name, document_xml(data.decode()) if name == "word/document.xml" else data)
    return changed.getvalue()


def _pdf(drawing: bytes) -> bytes:
    """A page with a drawing."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, NameObject

    writer, stream, out = PdfWriter(), DecodedStreamObject(), io.BytesIO()
    stream.set_data(drawing)
    page = writer.add_blank_page(600, 800)
    page[NameObject("/Contents")] = writer._add_object(stream.flate_encode())
    writer.write(out)
    return out.getvalue()


_LAUGHS = '<!DOCTYPE d [<!ENTITY a0 "ha">' + "".join(
    f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10)
) + "]>"  # fmt: skip

BOMBS: dict[str, Callable[[], bytes]] = {
    "one-text.parquet": lambda: parquet(_same_text(1_000_000, 1_000_000)),
    "page.parquet": lambda: parquet(pa.array(["a" * 270_000_000]), use_dictionary=False),
    "lists.parquet": lambda: parquet(_lists(1 << 25), use_dictionary=False),
    "values.json": lambda: b"[" + b"[]," * 10_000_001 + b"[]]",
    "objects.json.gz": lambda: gzip.compress(b"[" + b'{"":{}},' * 4_000_000 + b"{}]", 1),
    "tags.html": lambda: b"<p>" * 2_000_001,
    "marks.md": lambda: b"*a*" * 1_000_001,
    "tags.docx": lambda: _docx(lambda xml: xml + "<a/>" * 4_000_001),
    "spans.docx": lambda: _docx(lambda xml: xml.replace("<w:tcPr>", '<w:tcPr><w:gridSpan w:val="2000000000"/>')),
    "entities.docx": lambda: _docx(
        lambda xml: xml.split("?>")[0] + "?>" + _LAUGHS + xml.split("?>")[1].replace("cell", "&a9;")
    ),
    "drawing.pdf": lambda: _pdf(b"0 g\n" * 4_000_000),
    "line.jsonl.gz": lambda: gzip.compress(b'{"text": "' + b"a" * 40_000_000, 1),
    "probes.jsonl.gz": lambda: gzip.compress(b'{"question": "' + b"a" * 20_000_000, 1),
    "junk-probes.jsonl.gz": lambda: gzip.compress(b"x\n" * 1_000_000, 1),
}


def main() -> None:
    """Make each bomb, read it, and print what came of it."""
    with tempfile.TemporaryDirectory() as name:
        for bomb, make in BOMBS.items():
            path = Path(name) / bomb
            path.write_bytes(make())
            gc.collect()
            pa.default_memory_pool().release_unused()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = _status_mb("VmRSS")
            said = _read(path)
            row = {"bomb": bomb, "bytes": path.stat().st_size, "said": said, "grown_mb": _status_mb("VmHWM") - before}
            print(json.dumps(row), flush=True)


def _read(path: Path) -> str:
    """What reading says in the end, after a few hundred passages."""
    if "probes" in path.name:
        try:
            return f"{len(read_probes(path).rows)} probes"
        except SourceError as error:
            return error.what.removeprefix(str(path))
    failures: list[str] = []
    reading = read_passages(
        Source(path.name, path),
        split=SplitConfig(),
        columns=None,
        on_failure=lambda failure: failures.append(failure.error),
    )
    try:
        n_read = len(list(islice(reading, _N_PASSAGES)))
    except SourceError as error:
        return "; ".join([*failures[:1], error.what])
    return "; ".join([*failures[:1], f"{n_read} passages"])


def _status_mb(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024 // 1_000_000


if __name__ == "__main__":
    main()
