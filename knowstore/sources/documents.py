"""Documents: plain text, Markdown, HTML, PDF and Word files become a title and paragraphs."""

from __future__ import annotations

import html
import io
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markdown_it import MarkdownIt

from knowstore.errors import SourceError
from knowstore.records import SourceFailure
from knowstore.sources.dates import iso_date
from knowstore.sources.finding import Source
from knowstore.sources.limits import MAX_PAGE_BYTES, bounded, check_html, check_html_nesting, check_markdown, check_word
from knowstore.sources.opening import decode, unreadable
from knowstore.sources.splitting import fold

if TYPE_CHECKING:
    from bs4 import BeautifulSoup
    from docx.document import Document as DocxDocument
    from markdown_it.token import Token
    from pypdf import PdfReader

_FRONT_MATTER = re.compile(r"---[^\S\n]*\n(.*?\n)?(?:---|\.\.\.)[^\S\n]*(?:\n|\Z)", re.DOTALL)
_FRONT_MATTER_ENTRY = re.compile(r"^(title|date)[^\S\n]*:[^\S\n]*(.+)$", re.MULTILINE | re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*>")
_LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_BLANKS = re.compile(r"\s+")
_WRAPPED_WORD = re.compile(r"(?<=[a-z])-\n(?=[a-z])")
_HTML_UNSEEN = {"script", "style", "nav", "noscript", "template", "svg", "head"}
_HTML_BLOCKS = {
    "address", "article", "aside", "blockquote", "caption", "dd", "details", "div", "dl", "dt", "fieldset",
    "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "legend", "li",
    "main", "ol", "p", "pre", "section", "summary", "table", "tr", "ul",
}  # fmt: skip
_HTML_SPACED = {"br", "button", "label", "option", "td", "th"}
_DECLARED_ENCODING = re.compile(
    rb"""(?:\A\s*<\?xml[^<>]*?\sencoding|<meta\s[^<>]*?charset)\s*=\s*["']?([\w.:-]+)""", re.IGNORECASE
)
_LABEL_LETTERS = 200
_DECLARATION_BYTES = 8_192  # browsers look for a declaration in the first 1,024
_HTML_DATES = ("article:published_time", "date", "dc.date", "dcterms.date", "datepublished")
_PARAGRAPH = "\n\n"


@dataclass(frozen=True)
class Document:
    """A text with its title, before it is split; paragraphs are separated by blank lines."""

    text: str
    title: str = ""
    date: str = ""


def title_of_name(source: Source) -> str:
    """The file's stem with `-` and `_` as blanks; "" for stdin."""
    path = source.shown or source.path
    if path is None:
        return ""
    name = path.name.removesuffix(path.suffix) if path.suffix.lower() == ".gz" else path.name
    stem, dot, _ = name.rpartition(".")
    return fold(re.sub(r"[-_]+", " ", stem if dot else name))


def read_txt(data: bytes, source: Source) -> Document:
    """Plain text; the title is the file's name."""
    return Document(decode(data, source), title_of_name(source))


def read_markdown(data: bytes, source: Source) -> Document:
    """Markdown without its markup; the title is the front matter's, else the first heading.

    Code and table rows stay as text, raw HTML loses its tags, links and images keep their words.
    """
    text = decode(data, source).replace("\r\n", "\n")
    check_markdown(text, source)
    entries: dict[str, str] = {}
    if match := _FRONT_MATTER.match(text):
        found = _FRONT_MATTER_ENTRY.findall(match[1] or "")
        entries = {key.lower(): value.strip().strip("\"'") for key, value in found}
        text = text[match.end() :]
    with _parsing(source, "Markdown"):
        blocks = list(_markdown_blocks(MarkdownIt("commonmark").enable("table").parse(text)))
    headings = [n for n, (is_heading, _) in enumerate(blocks) if is_heading]
    title = entries.get("title", "")
    if not title and headings:
        title = blocks[headings[0]][1]
        del blocks[headings[0]]
    body = _PARAGRAPH.join(block for _, block in blocks)
    return Document(body, title or title_of_name(source), iso_date(entries.get("date", "")))


def _markdown_blocks(tokens: list[Token]) -> Iterator[tuple[bool, str]]:
    """(whether it is a heading, its text) of each block that has text; a table row is one block."""
    is_heading = False
    row: list[str] | None = None
    for token in tokens:
        if token.type == "heading_open":
            is_heading = True
        elif token.type == "heading_close":
            is_heading = False
        elif token.type == "tr_open":
            row = []
        elif token.type == "tr_close" and row is not None:
            yield False, " | ".join(row)
            row = None
        elif token.type == "inline" and row is not None:
            row.append(_inline_text(token))
        elif token.type == "inline":
            yield is_heading, _inline_text(token)
        elif token.type in ("fence", "code_block"):
            yield False, token.content
        elif token.type == "html_block":
            yield False, html.unescape(_TAG.sub(" ", _without_comments(token.content)))


def _without_comments(text: str) -> str:
    """A blank for each comment; one that does not end is none."""
    parts, at = [], 0
    while (start := text.find("<!--", at)) >= 0 and (end := text.find("-->", start + 4)) >= 0:
        parts += [text[at:start], " "]
        at = end + 3
    return "".join([*parts, text[at:]])


def _inline_text(token: Token) -> str:
    parts = []
    for child in token.children or []:
        if child.type in ("softbreak", "hardbreak") or (
            child.type == "html_inline" and _LINE_BREAK.fullmatch(child.content)
        ):
            parts.append("\n")
        elif child.type == "image":
            parts.append(_inline_text(child))
        elif child.type in ("text", "code_inline", "text_special"):
            parts.append(child.content)
    return "".join(parts).strip()


def read_html(data: bytes, source: Source) -> Document:
    """HTML as a reader sees it, without navigation; the title is `<title>`, else the first `<h1>`."""
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise _missing_docs(source, "HTML") from error
    declared = _DECLARED_ENCODING.search(data, 0, _DECLARATION_BYTES)
    text = decode(data, source, declared and declared[1].decode("ascii"))
    check_html(text, source)
    with _parsing(source, "HTML"):
        check_html_nesting(text, source)
        soup = BeautifulSoup(text, "lxml")
        headings = soup.head and soup.head.title, soup.h1
        title = next((text for tag in headings if tag and (text := fold(tag.get_text()))), "")
        date = _html_date(soup)
        body = _html_text(soup)
    return Document(body, title or title_of_name(source), date)


def _html_date(soup: BeautifulSoup) -> str:
    for meta in soup.find_all("meta"):
        key = str(meta.get("property") or meta.get("name") or meta.get("itemprop") or "")
        if key.lower() in _HTML_DATES and (date := iso_date(str(meta.get("content", "")))):
            return date
    return ""


def _html_text(soup: BeautifulSoup) -> str:
    """The visible text in one walk: blocks apart by blank lines, blanks inside them folded."""
    from bs4.element import NavigableString, Tag

    parts: list[str] = []
    pending: list[object] = [soup]
    while pending:
        node = pending.pop()
        if isinstance(node, Tag):
            if node.name not in _HTML_UNSEEN:
                edge = _PARAGRAPH if node.name in _HTML_BLOCKS else " " if node.name in _HTML_SPACED else ""
                parts.append(edge)
                pending.append(edge)
                pending.extend(reversed(node.contents))
        elif type(node) is NavigableString:
            parts.append(_BLANKS.sub(" ", node))
        elif type(node) is str:  # the edge after a tag; comments and the like are other kinds of str
            parts.append(node)
    return "".join(parts)


def read_pdf(data: bytes, source: Source, max_bytes: int) -> Iterator[Document | SourceFailure]:
    """The text of a PDF, page after page; the title is the metadata's, else the file's name.

    Yields: a failure for each page that cannot be read, then the document.

    Raises:
        SourceError: not a PDF, encrypted with a password, without any text (scanned pages), or with more than
            `max_bytes` characters.
    """
    try:
        import pypdf
        from pypdf.errors import DependencyError
    except ImportError as error:
        raise _missing_docs(source, "PDF") from error
    failures, pages = [], []
    with _parsing(source, "PDF"):
        reader = pypdf.PdfReader(io.BytesIO(data))
        try:
            is_locked = reader.is_encrypted and not reader.decrypt("")
        except DependencyError:
            is_locked = True
        if is_locked:
            raise unreadable(source, "the PDF is encrypted", "save it without a password")
        for failure, text in bounded(_pdf_pages(reader, source), source, max_bytes):
            if failure is None:
                pages.append(text)
            else:
                failures.append(failure)
        title = fold(str((reader.metadata and reader.metadata.title) or ""))
    yield from failures
    text = _WRAPPED_WORD.sub("", "\n".join(pages))
    if not failures and not text.strip():
        raise unreadable(
            source,
            f"the PDF has no text in its {len(pages)} pages",
            "run text recognition (OCR) on scanned pages first",
        )
    yield Document(text, title or title_of_name(source))


def _pdf_pages(reader: PdfReader, source: Source) -> Iterator[tuple[SourceFailure | None, str]]:
    """The text of each page, or why it cannot be read."""
    for number, page in enumerate(reader.pages, start=1):
        reason, text = "", ""
        try:
            contents = page.get_contents()
            n_bytes = 0 if contents is None else len(contents.get_data())
            if n_bytes > MAX_PAGE_BYTES:
                reason = f"its drawing has {n_bytes:,} bytes, more than the limit of {MAX_PAGE_BYTES:,}"
            else:
                text = page.extract_text()
        except Exception as error:  # whatever a parser raises on a malformed page
            reason = repr(error)
        place = f"{source.name}#page{number}"
        yield (SourceFailure(place, f"the page cannot be read: {reason}") if reason else None), text


def read_docx(data: bytes, source: Source, max_bytes: int) -> Document:
    """The paragraphs and table rows of a Word file; the title is its property, else the first heading.

    Raises:
        SourceError: not a Word file, or one that grows beyond limits, `max_bytes` uncompressed among them.
    """
    try:
        import docx
    except ImportError as error:
        raise _missing_docs(source, "Word") from error
    with _parsing(source, "Word"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            check_word(archive, source, max_bytes)
        document = docx.Document(io.BytesIO(data))
        blocks = list(bounded(_docx_blocks(document), source, max_bytes))
        title = fold(document.core_properties.title)
    headings = [n for n, (is_heading, _) in enumerate(blocks) if is_heading]
    if not title and headings:
        title = fold(blocks[headings[0]][1])
        del blocks[headings[0]]
    return Document(_PARAGRAPH.join(block for _, block in blocks), title or title_of_name(source))


def _docx_blocks(document: DocxDocument) -> Iterator[tuple[bool, str]]:
    from docx.enum.style import WD_STYLE_TYPE
    from docx.oxml.ns import qn

    names = {style.style_id: style.name for style in document.styles if style.type == WD_STYLE_TYPE.PARAGRAPH}
    default = document.styles.default(WD_STYLE_TYPE.PARAGRAPH)
    pending = list(reversed(document.element.body))
    while pending:
        element = pending.pop()
        if element.tag in (qn("w:sdt"), qn("w:sdtContent")):  # a content control
            pending.extend(reversed(element))
        elif element.tag == qn("w:p"):
            name = names.get(element.style, default and default.name)
            if (text := _docx_text(element)).strip():
                yield str(name).startswith(("Heading", "Title")), text
        elif element.tag == qn("w:tbl"):
            above: dict[int, str] = {}
            for row in element.tr_lst:
                texts, above = _docx_row(row, above)
                yield False, " | ".join(filter(None, texts))


def _docx_row(row: Any, above: Mapping[int, str]) -> tuple[list[str], dict[int, str]]:
    """The texts of a table row's cells, and by column those that cells below may be merged with. A short one is told in
    every row that it is merged over, for which it says something; a long one in its first."""
    from docx.oxml.ns import qn

    texts, merged, column = [], dict[int, str](), int(row.grid_before)
    for cell in row.tc_lst:
        if cell.vMerge == "continue" and column in above:
            text = merged[column] = above[column]
        else:
            text = "\n".join(map(_docx_text, cell.iter(qn("w:p")))).strip()
            if cell.vMerge:
                merged[column] = text if len(text) <= _LABEL_LETTERS else ""
        texts.append(text)
        column += cell.grid_span
    return texts, merged


def _docx_text(paragraph: Any) -> str:
    """The text of a paragraph's element, of what was inserted, tagged or put in a box too; not what was moved away."""
    from docx.oxml.ns import qn

    fallback = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
    unseen = {qn("w:moveFrom"), qn("w:del"), fallback}
    runs = paragraph.iter(qn("w:r"))
    return "".join(run.text for run in runs if not any(above.tag in unseen for above in run.iterancestors()))


def _missing_docs(source: Source, kind: str) -> SourceError:
    return unreadable(source, f"the libraries that read {kind} are not installed", "pip install 'knowstore[docs]'")


@contextmanager
def _parsing(source: Source, kind: str) -> Iterator[None]:
    """Keep a parser's warnings and log lines off the terminal, and name the file in what it raises."""
    logger = logging.getLogger("pypdf")
    was_propagating, handler = logger.propagate, logging.NullHandler()
    logger.propagate = False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except SourceError:
        raise
    except Exception as error:  # whatever a parser raises on a malformed file
        detail = fold(str(error)) or type(error).__name__
        raise unreadable(
            source, f"is not a sound {kind} file: {detail}", "open it in its program and save it again"
        ) from error
    finally:
        logger.removeHandler(handler)
        logger.propagate = was_propagating
