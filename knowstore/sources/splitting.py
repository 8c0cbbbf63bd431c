"""A text becomes passages of about 100 words, cut at sentence ends (DPR's form)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from knowstore.records import Passage, well_formed
from knowstore.sources.sentences import sentence_spans

# A word is a run without blanks; scripts written without blanks count by character, and a run that
# goes on (a long URL, encoded data) counts as a word every 30 characters.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]{{1,30}}")
_PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")
_LINE_CONTROLS = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\ufeff]")


def clean_text(text: str) -> str:
    """Make line ends `\\n`, drop control characters, and replace lone surrogates by U+FFFD."""
    return well_formed(_CONTROLS.sub("", _LINE_CONTROLS.sub("\n", text)))


def fold(text: str) -> str:
    """Clean a text and fold every run of blanks to one space: a title, a cell, one paragraph."""
    return " ".join(clean_text(text).split())


def split_text(text: str, *, title: str = "", source: str = "", date: str = "", words: int = 100) -> list[Passage]:
    """Split a text into passages of about `words` words.

    Whole sentences are packed until the next one would not fit; a passage that is three quarters
    full also ends where a paragraph ends. A sentence of more than `2 * words` words is cut between
    words, and a last passage of fewer than `words / 4` joins the one before it when both together
    have at most `1.5 * words`. A text of at most `1.5 * words` words stays one passage.

    Args:
        text: paragraphs separated by blank lines; blanks inside a paragraph are folded to one
            space, control characters dropped, lone surrogates replaced.
        title: given to every passage, as are `source` and `date`.
        words: wanted length of a passage in words.

    Returns:
        The passages in order, paragraphs within one separated by a newline; none for a blank text.
    """
    paragraphs = [folded for part in _PARAGRAPH_END.split(clean_text(text)) if (folded := " ".join(part.split()))]
    if not paragraphs:
        return []
    if sum(map(_n_words, paragraphs)) <= 1.5 * words:
        parts = ["\n".join(paragraphs)]
    else:
        parts = [_joined(units) for units in _packed(_units(paragraphs, words), words)]
    first = Passage(text=parts[0], title=fold(title), source=source, date=date)
    return [first, *(replace(first, text=part) for part in parts[1:])]


@dataclass(frozen=True)
class _Unit:
    """What is never cut: a sentence, or a piece of one that is too long; `before` joins it to the last."""

    text: str
    n_words: int
    before: str


def _n_words(text: str) -> int:
    return len(_WORD.findall(text))


def _units(paragraphs: list[str], words: int) -> Iterator[_Unit]:
    for paragraph in paragraphs:
        before, last_end = "\n", 0
        for start, end in _pieces(paragraph, words):
            if start > 0:
                before = " " if start > last_end else ""
            yield _Unit(paragraph[start:end], _n_words(paragraph[start:end]), before)
            last_end = end


def _pieces(paragraph: str, words: int) -> Iterator[tuple[int, int]]:
    """Spans of the sentences of a paragraph, the overlong ones in pieces of at most `words` words."""
    for start, end in sentence_spans(paragraph):
        spans = [match.span() for match in _WORD.finditer(paragraph, start, end)]
        if len(spans) <= 2 * words:
            yield start, end
        else:
            for first in range(0, len(spans), words):
                piece = spans[first : first + words]
                yield piece[0][0], piece[-1][1]


def _packed(units: Iterator[_Unit], words: int) -> list[list[_Unit]]:
    packs: list[list[_Unit]] = []
    n_words = 0
    for unit in units:
        is_full = n_words + unit.n_words > words or (unit.before == "\n" and n_words >= 0.75 * words)
        if not packs or is_full:
            packs.append([])
            n_words = 0
        packs[-1].append(unit)
        n_words += unit.n_words
    if len(packs) > 1 and n_words < words / 4:
        n_words_before = sum(unit.n_words for unit in packs[-2])
        if n_words_before + n_words <= 1.5 * words:
            packs[-2:] = [packs[-2] + packs[-1]]
    return packs


def _joined(units: list[_Unit]) -> str:
    return units[0].text + "".join(unit.before + unit.text for unit in units[1:])
