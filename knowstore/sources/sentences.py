"""Where sentences begin and end, by sentencex (Wikimedia's rule-based segmenter)."""

from __future__ import annotations

import re

import sentencex

from knowstore.records import well_formed

# sentencex 1.0 panics on a blank that is not one byte of UTF-8 and cannot encode a lone surrogate.
_WIDE_BLANK = re.compile(r"[^\S\n]")


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
    for boundary in sentencex.get_sentence_boundaries("en", same_length):
        start, end = boundary["start_index"], boundary["end_index"]
        sentence = text[start:end]
        start += len(sentence) - len(sentence.lstrip())
        end -= len(sentence) - len(sentence.rstrip())
        if start < end:
            spans.append((start, end))
    return spans
