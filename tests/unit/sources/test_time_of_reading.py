"""Small files that took minutes or hours, for each of their parts was compared with all others."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

_UNSTYLED = "<w:p><w:pPr><w:pStyle w:val='none'/></w:pPr><w:r><w:t>word</w:t></w:r></w:p>"
_MERGED = "<w:tr><w:tc><w:tcPr><w:vMerge/></w:tcPr><w:p/></w:tc></w:tr>"
_ROW = "<w:tr><w:tc><w:p><w:r><w:t>word</w:t></w:r></w:p></w:tc></w:tr>"


def word(body: str, n_styles: int = 0) -> bytes:
    """A Word file with this in its text, and with so many styles of its own."""
    docx = pytest.importorskip("docx")
    plain, changed = io.BytesIO(), io.BytesIO()
    docx.Document().save(plain)
    styles = "".join(
        f"<w:style w:type='paragraph' w:styleId='s{n}'><w:name w:val='s{n}'/></w:style>" for n in range(n_styles)
    )
    with zipfile.ZipFile(plain) as before, zipfile.ZipFile(changed, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            text = before.read(name)
            if name == "word/document.xml":
                text = text.replace(b"<w:body>", b"<w:body>" + body.encode())
            elif name == "word/styles.xml":
                text = text.replace(b"</w:styles>", styles.encode() + b"</w:styles>")
            after.writestr(name, text)
    return changed.getvalue()


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "comments.md": (lambda: b"word\n\n" + b"<!--" * 300_000, ""),
    "quotes.txt": (lambda: b"word " + b'!"' * 250_000, ""),
    "declarations.html": (lambda: b"<meta " * 100_000 + b">" + b"word " * 2_000_000, ""),
    "charsets.html": (lambda: b"<metacharset=" * 20_000 + b">" + b"word " * 500_000, ""),
    "ends.html": (lambda: b"<b></a>" * 900_000, "has too many end tags in 20,"),
    "many-ends.html": (lambda: b"<p><b></a>word</b>" * 20_000, ""),
    "merged.docx": (lambda: word(f"<w:tbl>{_ROW}{_MERGED * 10_000}</w:tbl>"), ""),
    "styles.docx": (lambda: word(_UNSTYLED * 10_000, n_styles=10_000), ""),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_many_equal_parts_is_read_or_refused_soon(tmp_path: Path, read: Callable, name: str) -> None:
    make, reason = FILES[name]
    (tmp_path / name).write_bytes(make())
    reading = read(tmp_path / name)
    if reason:
        assert reason in reading.error.what
    else:
        assert reading.error is None
        assert "word" in reading.texts[0]
