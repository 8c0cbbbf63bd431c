from __future__ import annotations

import csv
import gzip
import io
import json
import logging
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from knowstore.errors import ConfigError
from knowstore.records import Passage
from knowstore.sources import ColumnMap

ROWS = [
    {"title": "Rome", "text": "Rome was founded in 753 BC.", "date": "2020-05-01"},
    {"title": "Oslo", "text": 'Oslo, "the tiger city",\nis in Norway.', "date": "2021-06-02"},
]
EXPECTED = [
    ("Rome", "Rome was founded in 753 BC.", "2020-05-01"),
    ("Oslo", 'Oslo, "the tiger city", is in Norway.', "2021-06-02"),
]


def csv_bytes(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet_bytes(rows: list[dict[str, object]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def fields(passages: list[Passage]) -> list[tuple[str, str, str]]:
    return [(passage.title, passage.text, passage.date) for passage in passages]


TABLES = {
    "rows.csv": csv_bytes(ROWS),
    "semicolons.csv": csv_bytes(ROWS, ";"),
    "rows.tsv": csv_bytes(ROWS, "\t"),
    "rows.jsonl": "\n\n".join(json.dumps(row) for row in ROWS).encode(),
    "rows.ndjson": "\r\n".join(json.dumps(row) for row in ROWS).encode(),
    "list.json": json.dumps(ROWS).encode(),
    "object.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "rows.parquet": parquet_bytes(ROWS),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_every_kind_of_rows_gives_the_same_passages(
    tmp_path: Path, read: Callable, name: str, is_compressed: bool
) -> None:
    path = tmp_path / (f"{name}.gz" if is_compressed else name)
    path.write_bytes(gzip.compress(TABLES[name]) if is_compressed else TABLES[name])
    reading = read(path)
    assert fields(reading.passages) == EXPECTED
    assert {passage.source for passage in reading.passages} == {path.as_posix()}
    assert (reading.failures, reading.error) == ([], None)


@pytest.mark.parametrize("name", ["rows.jsonl", "list.json", "rows.parquet"])
@pytest.mark.parametrize("is_compressed", [False, True])
def test_stdin_tells_its_format_by_its_beginning(read: Callable, name: str, is_compressed: bool) -> None:
    data = gzip.compress(TABLES[name]) if is_compressed else TABLES[name]
    reading = read(None, stdin=io.BytesIO(data))
    assert fields(reading.passages) == EXPECTED
    assert reading.passages[0].source == "-"


def test_stdin_of_plain_text_is_a_text_without_a_title(read: Callable) -> None:
    assert fields(read(None, stdin=io.BytesIO(b"Just text.")).passages) == [("", "Just text.", "")]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("qa.jsonl", b'{"id": 1, "question": "q", "passage": {"title": "T", "text": "Body."}, "source": "s"}'),
        ("qa.parquet", parquet_bytes([{"question": "q", "passage": {"title": "T", "text": "Body."}}])),
        ("one.json", b'{"title": "T", "body": "Body.", "tags": ["a", "b"]}'),
        ("names.csv", b"Headline , CONTENT,\nT,Body.,\n"),
        ("mark.csv", "\ufefftext,title\nBody.,T\n".encode()),
        ("wide.csv", "text,title\nBody.,T\n".encode("utf-16")),
        ("wide.jsonl", '{"text": "Body.", "name": "T"}\n'.encode("utf-16")),
    ],
)
def test_usual_column_names_and_nested_passages_are_found(
    tmp_path: Path, read: Callable, name: str, data: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    reading = read(tmp_path / name)
    assert [(passage.title, passage.text) for passage in reading.passages] == [("T", "Body.")]
    assert reading.failures == []


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_column_map_says_which_columns_are_read(tmp_path: Path, read: Callable, suffix: str) -> None:
    row = {"text": "no", "title": "no", "summary": "Yes.", "topic": "T", "day": "2020-01-02"}
    data = {"csv": csv_bytes([row]), "jsonl": json.dumps(row).encode(), "parquet": parquet_bytes([row])}[suffix]
    (tmp_path / f"a.{suffix}").write_bytes(data)
    reading = read(tmp_path / f"a.{suffix}", columns=ColumnMap.parse("text=summary, title=topic,date=day"))
    assert fields(reading.passages) == [("T", "Yes.", "2020-01-02")]


@pytest.mark.parametrize("mapping", ["", "text", "text=", "words=a", "text=a,text=b", "text=a,,"])
def test_a_column_map_that_cannot_be_read_is_refused(mapping: str) -> None:
    with pytest.raises(ConfigError, match="column map"):
        ColumnMap.parse(mapping)


def test_parquet_dates_and_numbers_become_text(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_bytes([{"text": "Body.", "title": 7, "created": date(2020, 1, 2)}]))
    assert fields(read(tmp_path / "a.parquet").passages) == [("7", "Body.", "2020-01-02")]


def test_a_long_row_is_split_and_keeps_its_title(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"title": "T", "text": "One two three four five. " * 60}))
    reading = read(tmp_path / "a.jsonl")
    assert [passage.title for passage in reading.passages] == ["T", "T", "T"]


def test_rows_come_one_at_a_time(tmp_path: Path) -> None:
    from knowstore.config import SplitConfig
    from knowstore.sources import Source, read_passages

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "First."}\n' + '{"text": "Other."}\n' * 200_000)
    split = SplitConfig(max_file_bytes=1_000)
    passages = read_passages(Source(str(path), path), split=split, columns=None, on_failure=pytest.fail)
    assert next(passages).text == "First."
    passages.close()


def test_plain_text_is_titled_by_its_name(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "the_old-town.v2.txt").write_text("A first line.\n\nA second paragraph.")
    assert fields(read(tmp_path / "the_old-town.v2.txt").passages) == [
        ("the old town.v2", "A first line.\nA second paragraph.", "")
    ]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8", "Zoë — naïve 東京 😀."),
        ("utf-8-sig", "Zoë naïve."),
        ("utf-16", "Zoë naïve 東京."),
        ("utf-32", "Zoë naïve."),
        ("latin-1", "Le café à Zürich était fermé. Voilà une autre phrase, déjà écrite en été."),
        ("cp1252", "He said “naïve” things – in a café, for 5€."),
        ("cp1251", "Привет, мир. Это русский текст для проверки кодировки."),
        ("shift_jis", "これは日本語の文章です。東京は日本の首都です。"),
    ],
)
def test_texts_of_many_encodings_are_read(tmp_path: Path, read: Callable, encoding: str, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert read(tmp_path / "a.txt").texts == [text]


def test_markdown_loses_its_markup_and_takes_its_title_from_the_first_heading(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.md").write_text(
        "# The *Title*\n\nSome **bold** [link](http://x) and `code`\nand more.\n\n## Part\n\n- one\n- two &amp; three\n"
        "\n```python\nprint(1)\n```\n\n| a | b |\n| - | - |\n| 1 | 2 |\n\n<div>raw</div>\n\n![picture](x.png)\n"
    )
    [passage] = read(tmp_path / "a.md").passages
    assert passage.title == "The Title"
    assert passage.text.split("\n") == [
        "Some bold link and code and more.", "Part", "one", "two & three", "print(1)", "a | b", "1 | 2", "raw",
        "picture",
    ]  # fmt: skip


def test_markdown_front_matter_gives_title_and_date(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.md").write_text('---\ntitle: "From above"\ntags: [a]\ndate: 2022-03-04\n---\n# Heading\n\nBody.\n')
    assert fields(read(tmp_path / "a.md").passages) == [("From above", "Heading\nBody.", "2022-03-04")]


def test_markdown_without_heading_is_titled_by_its_name(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "my-note.md").write_text("Only text.")
    assert fields(read(tmp_path / "my-note.md").passages) == [("my note", "Only text.", "")]


def test_html_gives_what_a_reader_sees(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.html").write_text(
        "<html><head><title>The\n page</title><style>x{}</style>"
        '<meta property="article:published_time" content="2020-02-03T01:02:03Z"></head><body><nav>Menu</nav><!-- no -->'
        "<h1>Head</h1><p>A <b>bo</b>ld\n\nword<br>here.</p><script>var a;</script>"
        "<ul><li>One<li>Two</ul><table><tr><td>a</td><td>b</td></tr></table>&copy; tail</body></html>"
    )
    assert fields(read(tmp_path / "a.html").passages) == [
        ("The page", "Head\nA bold word here.\nOne\nTwo\na b\n© tail", "2020-02-03")
    ]


def test_html_is_decoded_as_it_declares(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.htm").write_bytes('<meta charset="iso-8859-2"><h1>T</h1><p>Zażółć gęślą.</p>'.encode("iso-8859-2"))
    assert fields(read(tmp_path / "a.htm").passages) == [("T", "T\nZażółć gęślą.", "")]


@pytest.mark.parametrize(
    "declaration",
    [
        '<?xml version="1.0" encoding="iso-8859-2"?>\n<html>',
        "<html><META http-equiv='Content-Type' content='text/html; charset = iso-8859-2'>",
        f"<html><!-- {'word ' * 1_000}--><meta name=a><meta charset=iso-8859-2>",
    ],
)
def test_html_declares_its_encoding_in_several_ways(tmp_path: Path, read: Callable, declaration: str) -> None:
    (tmp_path / "a.html").write_bytes(f"{declaration}<p>Zażółć gęślą.</p>".encode("iso-8859-2"))
    assert read(tmp_path / "a.html").texts == ["Zażółć gęślą."]


def test_html_that_says_latin_1_is_read_as_browsers_do(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.html").write_bytes("<meta charset=iso-8859-1><p>“Zoë”</p>".encode("cp1252"))
    assert read(tmp_path / "a.html").texts == ["“Zoë”"]


def test_html_of_many_or_deep_blocks_is_read(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.html").write_text("<p>One two.</p>" * 5_000)
    assert " ".join(read(tmp_path / "a.html").texts).count("One two.") == 5_000
    (tmp_path / "a.html").write_text("<div>" * 2_000 + "deep")
    assert read(tmp_path / "a.html").texts == ["deep"]


def test_pdf_text_and_title_are_read_without_a_word_on_the_terminal(
    tmp_path: Path, read: Callable, make_pdf: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.pdf").write_bytes(make_pdf(["Rome was founded", "in 753 BC, it is re-", "ported."], "About Rome"))
    (tmp_path / "b_c.pdf").write_bytes(b"noise" + make_pdf(["Plain."]) + b"noise")
    (tmp_path / "locked.pdf").write_bytes(make_pdf(["Open."], password="x"))
    assert fields(read(tmp_path / "a.pdf").passages) == [
        ("About Rome", "Rome was founded in 753 BC, it is reported.", "")
    ]
    assert fields(read(tmp_path / "b_c.pdf").passages) == [("b c", "Plain.", "")]
    assert logging.getLogger("pypdf").propagate
    assert capfd.readouterr() == ("", "")


def test_word_files_give_paragraphs_tables_and_the_first_heading_as_title(tmp_path: Path, read: Callable) -> None:
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_heading("The heading", 1)
    document.add_paragraph("First paragraph.")
    table = document.add_table(rows=1, cols=2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "a", "b"
    document.add_paragraph("Last.")
    document.save(str(tmp_path / "a.docx"))
    assert fields(read(tmp_path / "a.docx").passages) == [("The heading", "First paragraph.\na | b\nLast.", "")]
    document.core_properties.title = "The property"
    document.save(str(tmp_path / "a.docx"))
    assert read(tmp_path / "a.docx").passages[0].title == "The property"


def test_word_tables_keep_equal_cells_and_give_merged_ones_once(tmp_path: Path, read: Callable) -> None:
    docx = pytest.importorskip("docx")
    document = docx.Document()
    table = document.add_table(rows=2, cols=4)
    for row, texts in zip(table.rows, (("Oro", "3", "3", "9"), ("all", "", "7", "7")), strict=True):
        for cell, text in zip(row.cells, texts, strict=True):
            cell.text = text
    table.rows[1].cells[0].merge(table.rows[1].cells[1])
    document.save(str(tmp_path / "a.docx"))
    assert read(tmp_path / "a.docx").texts == ["Oro | 3 | 3 | 9\nall | 7 | 7"]


@pytest.mark.parametrize(("label", "told"), [("Oro", "Oro | "), ("Oro " * 51, "")])
def test_a_word_cell_merged_over_rows_is_told_in_each_when_it_is_a_label(
    label: str, told: str, tmp_path: Path, read: Callable
) -> None:
    docx = pytest.importorskip("docx")
    document = docx.Document()
    table = document.add_table(rows=3, cols=3)
    for row, texts in zip(table.rows, ((label, "1", "2"), ("", "3", "4"), ("Ada", "5", "")), strict=True):
        for cell, text in zip(row.cells, texts, strict=True):
            cell.text = text
    table.cell(0, 0).merge(table.cell(1, 0))
    table.cell(1, 2).merge(table.cell(2, 2))
    document.save(str(tmp_path / "a.docx"))
    assert read(tmp_path / "a.docx").texts == [f"{label.strip()} | 1 | 2\n{told}3 | 4\nAda | 5 | 4"]


def test_word_headings_are_told_by_their_styles_names(tmp_path: Path, read: Callable) -> None:
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_paragraph("First paragraph.").style.style_id = "Odd"
    heading = document.styles["Heading 2"]
    heading.style_id = "berschrift2"
    document.add_paragraph("The heading").style = heading
    document.save(str(tmp_path / "a.docx"))
    assert fields(read(tmp_path / "a.docx").passages) == [("The heading", "First paragraph.", "")]


def test_word_text_that_was_inserted_or_stands_in_controls_is_read(tmp_path: Path, read: Callable) -> None:
    docx = pytest.importorskip("docx")
    document = docx.Document()
    paragraph = document.add_paragraph("It closes at ")
    names = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    run = "<w:r><w:t xml:space='preserve'>{}</w:t></w:r>"
    for xml in (
        f"<w:del {names}><w:r><w:delText>five</w:delText></w:r></w:del>",
        f"<w:moveFrom {names}>{run.format('four')}</w:moveFrom>",
        f"<w:ins {names}>{run.format('nine')}</w:ins>",
        f"<w:sdt {names}><w:sdtContent>{run.format(' in winter')}</w:sdtContent></w:sdt>",
        f"<w:smartTag {names}>{run.format(' near Oro.')}</w:smartTag>",
        f"<w:r {names}><w:br/><w:t>Then</w:t><w:tab/><w:t>rest.</w:t><w:br w:type='page'/></w:r>",
    ):
        paragraph._p.append(docx.oxml.parse_xml(xml))
    block = f"<w:sdt {names}><w:sdtContent><w:p>{run.format('The code is 4711.')}</w:p></w:sdtContent></w:sdt>"
    document.element.body.insert(1, docx.oxml.parse_xml(block))
    document.save(str(tmp_path / "a.docx"))
    assert read(tmp_path / "a.docx").texts == ["It closes at nine in winter near Oro. Then rest.\nThe code is 4711."]


def test_line_breaks_comments_and_entities_of_html_in_markdown(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.md").write_text(
        "| a | b |\n|---|---|\n| Ada | London<br>1815<BR/>x |\n\n"
        "<div>Tom &amp; Jerry <!-- a > b secret --> live</div>\n"
    )
    assert read(tmp_path / "a.md").texts == ["a | b\nAda | London 1815 x\nTom & Jerry live"]


def test_words_of_neighbouring_html_elements_stay_apart(tmp_path: Path, read: Callable) -> None:
    body = "<select><option>x</option><option>y</option></select><details><summary>More</summary>Inside</details>"
    svg = "<svg><title>icon</title></svg>"
    (tmp_path / "a.html").write_text(f"<html><head><title></title></head><body>{svg}<h1>Head</h1>{body}</body></html>")
    assert fields(read(tmp_path / "a.html").passages) == [("Head", "Head\nx y\nMore\nInside", "")]


@pytest.mark.parametrize(
    "odd", ['"Hello, said Oro, and left.', '"No" she said', 'Delta said "no"', '"open', 'a "b', '"quoted"\t"'][:5]
)
def test_quotes_in_a_tsv_that_are_no_quotes_are_letters(odd: str, tmp_path: Path, read: Callable) -> None:
    rows = f'text\ttitle\nA one\tA\n{odd}\tB\nC three\tC\nD said "no"\tD\nE five\tE\n'
    (tmp_path / "a.tsv").write_text(rows)
    found = read(tmp_path / "a.tsv")
    assert (found.failures, found.texts) == ([], ["A one", odd, "C three", 'D said "no"', "E five"])


def test_quotes_in_a_tsv_that_are_quotes_are_read_as_such(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.tsv").write_text('text\ttitle\n"two\nlines"\tA\n"a\ttab"\t"B"\n')
    assert fields(read(tmp_path / "a.tsv").passages) == [("A", "two lines", ""), ("B", "a tab", "")]
