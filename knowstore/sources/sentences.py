"""Where sentences begin and end, by sentencex (Wikimedia's rule-based segmenter)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import sentencex

from knowstore.records import well_formed

# sentencex 1.0 panics on a blank that is not one byte of UTF-8 and cannot encode a lone surrogate.
_WIDE_BLANK = re.compile(r"[^\S\n]")
_UP_TO_LAST_BLANK = re.compile(r".*\s", re.DOTALL)
# Its time grows with the square of a text that has many marks and quotes: it is given so many characters at a time.
_WINDOW, _OVERLAP = 10_000, 1_000


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Find the sentences of a text.

    Abbreviations, initials and decimal points do not end a sentence; a blank line does.

    Args:
        text: any text; English rules apply, and the sentence marks of other scripts are known.

    Returns:
        Character spans (start, end) in order, without blanks at either end and without overlap,
        that together hold every character that is not blank.
    """
    same_length = well_formed(_WIDE_BLANK.sub(" ", text))
    spans = []
    for start, end in _boundaries(same_length):
        sentence = text[start:end]
        start += len(sentence) - len(sentence.lstrip())
        end -= len(sentence) - len(sentence.rstrip())
        if start < end:
            spans.append((start, end))
    return spans


def _boundaries(text: str) -> Iterator[tuple[int, int]]:
    """Sentences with the blanks around them, without a gap; one that is longer than a window is cut after a blank."""
    at = 0
    while len(text) - at > _WINDOW:
        window = text[at : at + _WINDOW]
        found = [(start, end) for start, end in _boundaries_in(window) if end <= _WINDOW - _OVERLAP]
        if not found:
            blank = _UP_TO_LAST_BLANK.match(window)
            found = [(0, blank.end() if blank else _WINDOW)]
        yield from ((at + start, at + end) for start, end in found)
        at += found[-1][1]
    yield from ((at + start, at + end) for start, end in _boundaries_in(text[at:]))


def _boundaries_in(window: str) -> Iterator[tuple[int, int]]:
    return ((found["start_index"], found["end_index"]) for found in sentencex.get_sentence_boundaries("en", window))
