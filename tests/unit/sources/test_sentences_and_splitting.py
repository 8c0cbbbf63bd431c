from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knowstore.sources import sentence_spans, split_text
from knowstore.sources.dates import iso_date

SENTENCE = "This text has exactly ten plain words in every sentence."


def test_sentences_end_at_full_stops_but_not_at_abbreviations() -> None:
    text = "Dr. Smith paid $3.50 in St. Louis, e.g. to J. R. R. Tolkien. Was it 5 p.m. then? Yes!"
    assert [text[start:end] for start, end in sentence_spans(text)] == [
        "Dr. Smith paid $3.50 in St. Louis, e.g. to J. R. R. Tolkien.",
        "Was it 5 p.m. then?",
        "Yes!",
    ]


def test_sentences_of_a_blank_text_are_none() -> None:
    assert sentence_spans(" \n\t ") == []


@given(st.text(st.sampled_from("aB. ?!\"'()\n\r\t\x85\u2028\u3000\u00a0é日。😀\ud800…1\0"), max_size=60))
def test_sentence_spans_are_ordered_trimmed_and_cover_every_character(text: str) -> None:
    covered = 0
    for start, end in sentence_spans(text):
        assert covered <= start < end <= len(text)
        assert text[start:end] == text[start:end].strip()
        assert not text[covered:start].strip()
        covered = end
    assert not text[covered:].strip()


@given(st.text(max_size=400))
def test_splitting_any_text_keeps_its_words_and_gives_no_blank_passage(text: str) -> None:
    passages = split_text(text, words=10)
    assert all(passage.text.strip() for passage in passages)
    assert split_text(text, words=10) == passages


def test_a_short_text_stays_one_passage_with_its_title() -> None:
    [passage] = split_text("  Rome was  founded\nin 753 BC. ", title=" Rome\n city ", source="a.txt", date="2020-01-02")
    assert (passage.text, passage.title) == ("Rome was founded in 753 BC.", "Rome city")
    assert (passage.source, passage.date) == ("a.txt", "2020-01-02")


def test_a_text_of_one_and_a_half_times_the_words_stays_one_passage() -> None:
    assert len(split_text(" ".join([SENTENCE] * 15))) == 1
    assert len(split_text(" ".join([SENTENCE] * 16))) == 2


def test_long_texts_are_cut_at_sentence_ends_near_the_wanted_length() -> None:
    passages = split_text(" ".join([SENTENCE] * 57), title="T")
    assert [len(passage.text.split()) // 10 for passage in passages] == [10] * 5 + [7]
    assert all(passage.text.endswith("sentence.") and passage.title == "T" for passage in passages)


def test_a_short_tail_joins_the_passage_before_it() -> None:
    passages = split_text(" ".join([SENTENCE] * 22))
    assert [passage.text.count("sentence.") for passage in passages] == [10, 12]


def test_a_sentence_that_is_too_long_is_cut_between_words() -> None:
    words = [f"w{n}" for n in range(450)]
    passages = split_text(" ".join(words))
    assert [len(passage.text.split()) for passage in passages] == [100, 100, 100, 100, 50]
    assert " ".join(passage.text for passage in passages).split() == words


def test_a_run_without_blanks_is_cut_too() -> None:
    passages = split_text("x" * 20_000)
    assert "".join(passage.text for passage in passages) == "x" * 20_000
    assert max(len(passage.text) for passage in passages) <= 3_000


def test_text_of_an_unspaced_script_is_cut_by_characters() -> None:
    passages = split_text("東京は日本の首都です。" * 60)
    assert 5 <= len(passages) <= 9
    assert all(passage.text.endswith("。") for passage in passages)


def test_a_nearly_full_passage_ends_with_its_paragraph() -> None:
    passages = split_text("\n\n".join([" ".join([SENTENCE] * 8)] * 3))
    assert [passage.text.count("sentence.") for passage in passages] == [8, 8, 8]


def test_paragraphs_stay_apart_and_their_blanks_are_folded() -> None:
    assert split_text("One\n  two.\r\n \r\nThree.")[0].text == "One two.\nThree."


def test_control_characters_and_lone_surrogates_are_cleaned() -> None:
    assert split_text("a\x00b\x07 c\ud800d \ufeffe\x0cf")[0].text == "ab c\ufffdd e f"


def test_a_blank_text_gives_no_passage() -> None:
    assert split_text(" \n\n\x00 ") == []


def test_sentences_of_a_long_paragraph_are_those_of_its_parts() -> None:
    parts = [
        'Dr. Smith said "Go home! Now." and left.',
        "It cost 3.14 dollars (of the U.S.) then.",
        "What?",
        "No one knew.",
    ]
    paragraph = " ".join(parts * 1_000)
    assert [paragraph[start:end] for start, end in sentence_spans(paragraph)] == parts * 1_000


def test_an_endless_sentence_is_cut_between_words() -> None:
    text = "word " * 10_000
    assert {word for start, end in sentence_spans(text) for word in text[start:end].split(" ")} == {"word"}
    assert sentence_spans("x" * 25_000) == [(0, 10_000), (10_000, 20_000), (20_000, 25_000)]


def test_a_text_of_a_million_characters_is_split_in_linear_time() -> None:
    started = time.perf_counter()
    assert len(split_text(" ".join([SENTENCE] * 17_000))) > 1_000
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2021-03-04", "2021-03-04"),
        ("2021-03-04T10:00:00Z", "2021-03-04"),
        ("2021/3/4", "2021-03-04"),
        ("2021", "2021-01-01"),
        (1999, "1999-01-01"),
        ("4 March 2021", "2021-03-04"),
        ("March 4, 2021", "2021-03-04"),
        ("Mar. 4, 2021 10:30", "2021-03-04"),
        ("Thu, 04 Mar 2021 10:00:00 +0000", "2021-03-04"),
        ("04/03/2021", ""),
        ("2021-13-40", ""),
        ("soon", ""),
        (True, ""),
        (None, ""),
    ],
)
def test_dates_become_iso_or_nothing(value: object, expected: str) -> None:
    assert iso_date(value) == expected
