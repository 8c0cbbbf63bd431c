"""Vector, text and hybrid search, filters and the FAISS index."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from knowstore.config import Filters
from knowstore.errors import ConfigError, FilterError, PassageError, RetrievalError
from knowstore.passages import FaissIndex, PassageRow, PassageTable
from knowstore.records import Passage

E = 8
QUERY = np.linspace(-1, 1, E, dtype=np.float32)
SOURCES = ["a/one.txt", "a/two.txt", "b/it's.txt", "100%", "100_", "back\\' slash"]


def _row(text: str, vector: np.ndarray, title: str = "", source: str = "", date: str = "") -> PassageRow:
    vector = vector.astype(np.float32)
    return PassageRow(Passage(text, title, source, date), vector, [(0, len(text))], vector[None])


@pytest.fixture
def table(tmp_path: Path) -> PassageTable:
    table = PassageTable.open(str(tmp_path), dim=E, create=True)
    rng = np.random.default_rng(0)
    rows = [
        _row(
            f"passage {i} about " + ("rivers" if i % 2 else "mountains"),
            rng.standard_normal(E),
            title=f"Title {i}",
            source=SOURCES[i % len(SOURCES)],
            date=f"2024-{1 + i % 12:02}-15" if i < 24 else "",
        )
        for i in range(30)
    ]
    table.add(rows[:20], 1)
    table.optimize()
    table.add(rows[20:], 2)  # not in the text index yet
    return table


def _stored(table: PassageTable, at: int) -> list[tuple[str, np.ndarray]]:
    batches = table.iter_rows(at, ["id", "vector"])
    return [(row["id"], np.array(row["vector"])) for batch in batches for row in batch.to_pylist()]


def test_vector_search_is_the_literal_inner_product(table: PassageTable) -> None:
    for at in (1, 2):
        expected = sorted(((-float(vector @ QUERY), name) for name, vector in _stored(table, at)))[:7]
        found = table.search_vector(QUERY, 7, at=at)
        assert [hit.id for hit in found] == [name for _, name in expected]
        np.testing.assert_allclose([-hit.score for hit in found], [score for score, _ in expected], rtol=1e-6)
        assert all(hit.live_from <= at and hit.score == hit.vector_score for hit in found)
        np.testing.assert_allclose(found[0].segment_vectors[0] @ QUERY, found[0].score, rtol=1e-2)
    assert table.search_vector(QUERY, 0, at=1) == []
    assert len(table.search_vector(QUERY, 99, at=2)) == 30


def test_equal_scores_are_ordered_by_id_however_rows_are_stored(tmp_path: Path) -> None:
    vector = np.ones(E)
    rows = [_row(f"same words {i}", vector, title="x") for i in range(40)]
    found = []
    for order in (1, -1):
        table = PassageTable.open(str(tmp_path / str(order)), dim=E, create=True)
        for row in rows[::order]:
            table.add([row], 1)
        table.optimize(retrain=True)
        searches = (
            table.search_vector(vector, 5, at=1),
            table.search_text("same words", 5, at=1, vector=vector),
            table.search_hybrid(vector, "same words", 5, at=1),
        )
        found.append([[(hit.id, hit.score) for hit in hits] for hits in searches])
        assert [hit.id for hit in searches[0]] == sorted(row.passage.passage_id for row in rows)[:5]
        index = FaissIndex.build(table, 1, device="cpu")
        assert [name for name, _ in index.search(vector, 5)] == [hit.id for hit in searches[0]]
    assert found[0] == found[1]


def test_text_search_finds_words_of_text_and_title_in_old_and_new_rows(table: PassageTable) -> None:
    assert {hit.text for hit in table.search_text("MOUNTAIN", 99, at=1)} == {
        f"passage {i} about mountains" for i in range(0, 20, 2)
    }
    assert table.search_text("passage 25", 1, at=2)[0].text == "passage 25 about rivers"
    assert table.search_text("title 3", 1, at=1)[0].title == "Title 3"
    assert all("25" not in hit.text for hit in table.search_text("passage 25", 99, at=1))


@pytest.mark.parametrize(
    "question",
    [
        "",
        "   ",
        "AND OR NOT (",
        '"open',
        "text:rivers*~^2",
        "'; DROP TABLE passages; --",
        "\0",
        "🙂",
        "\ud800",
        "w" * 9999,
    ],
)
def test_any_question_is_safe(table: PassageTable, question: str) -> None:
    table.search_text(question, 5, at=2)
    assert len(table.search_hybrid(QUERY, question, 5, at=2)) == 5
    assert table.count(2) == 30


def test_text_search_finds_words_of_scripts_without_blanks_and_folds_accents(tmp_path: Path) -> None:
    table = PassageTable.open(str(tmp_path), dim=E, create=True)
    table.add([_row("東京は日本の首都です", QUERY), _row("Das Café heißt Ünal", QUERY)], 1)
    assert [hit.text[:2] for hit in table.search_text("首都", 5, at=1)] == ["東京"]
    assert [hit.text[:3] for hit in table.search_text("cafe", 5, at=1)] == ["Das"]


@pytest.mark.parametrize(
    "text",
    [
        "Das Überraschungsmoment fällt aus.",
        "call it snake_case_identifier",
        "see docs.readthedocs.io",
        "the 2Jhello of it",
        f"{'endless' * 9} ends",
        "l'élève aujourd'hui",
    ],
)
def test_words_that_are_joined_to_others_are_no_sign_of_a_damaged_index(text: str, tmp_path: Path) -> None:
    table = PassageTable.open(str(tmp_path), dim=E, create=True)
    table.add([_row(text, QUERY)], 1)
    table.optimize()
    assert table.index_problems(table.existing([Passage(text).passage_id])) == []


def test_hybrid_search_fuses_both_ranks(table: PassageTable) -> None:
    found = table.search_hybrid(QUERY, "passage 25 rivers", 30, at=2)
    by_vector = [hit.id for hit in table.search_vector(QUERY, 50, at=2)]
    by_text = [hit.id for hit in table.search_text("passage 25 rivers", 50, at=2)]
    for hit in found:
        ranks = [ranking.index(hit.id) + 1 for ranking in (by_vector, by_text) if hit.id in ranking]
        assert hit.score == pytest.approx(sum(1 / (60 + rank) for rank in ranks))
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    vectors = dict(_stored(table, 2))
    for hit in table.search_text("passage 25", 3, at=2, vector=QUERY):
        assert hit.vector_score == pytest.approx(float(vectors[hit.id] @ QUERY), rel=1e-5)


def test_filters_keep_only_what_matches(table: PassageTable) -> None:
    def sources(filters: Filters) -> set[str]:
        hits = table.search_vector(QUERY, 99, at=2, filters=filters)
        assert {hit.id for hit in hits} == {
            hit.id for hit in table.search_hybrid(QUERY, "x", 99, at=2, filters=filters)
        }
        return {hit.source for hit in hits}

    for source in SOURCES:
        assert sources(Filters(source=source)) == {source}
    assert sources(Filters(source="a/*")) == {"a/one.txt", "a/two.txt"}
    assert sources(Filters(source="100%*")) == {"100%"}
    assert sources(Filters(source="100*")) == {"100%", "100_"}
    assert sources(Filters(source="b/it's*")) == {"b/it's.txt"}
    assert sources(Filters(source="*")) == set(SOURCES)
    assert {hit.title for hit in table.search_text("passage", 99, at=2, filters=Filters(title="Title 7"))} == {
        "Title 7"
    }
    assert {hit.live_from for hit in table.search_vector(QUERY, 99, at=2, filters=Filters(batch_id=2))} == {2}


@pytest.mark.parametrize(
    "attack", ["' OR 1=1 --", "\\' OR 1=1 --", "'') OR (''='", "%", "_", "x*' OR '1'='1", "%*", ""]
)
def test_filters_that_look_like_sql_match_nothing(table: PassageTable, attack: str) -> None:
    for filters in (Filters(source=attack), Filters(title=attack)):
        assert table.search_vector(QUERY, 9, at=2, filters=filters) == []
        assert table.search_text("passage", 9, at=2, filters=filters) == []


def test_halves_of_characters_match_what_became_of_them_and_no_id(table: PassageTable) -> None:
    assert table.get(["bytes\udcff"], at=None) == []
    assert table.search_vector(QUERY, 9, at=2, filters=Filters(source="bytes\udcff*")) == []
    table.add([_row("new", QUERY, title="bytes\ufffd")], 3)
    assert len(table.search_vector(QUERY, 9, at=3, filters=Filters(title="bytes\udcff"))) == 1


@pytest.mark.parametrize("batch_id", [2**63, -(10**30)])
def test_a_batch_that_no_table_can_hold_is_a_filter_error(table: PassageTable, batch_id: int) -> None:
    with pytest.raises(FilterError, match="edit batch"):
        table.search_vector(QUERY, 9, at=2, filters=Filters(batch_id=batch_id))


def test_dates_are_inclusive_at_every_precision(table: PassageTable) -> None:
    def months(date_from: str | None, date_to: str | None) -> list[int]:
        hits = table.search_vector(QUERY, 99, at=2, filters=Filters(date_from=date_from, date_to=date_to))
        return sorted({int(hit.date[5:7]) for hit in hits})

    assert months("2024-03-15", "2024-05-15") == [3, 4, 5]
    assert months("2024-03-16", "2024-05") == [4, 5]
    assert months("2024-11", None) == [11, 12]
    assert months(None, "2024-02") == [1, 2]
    assert months("2024", "2024") == list(range(1, 13))
    assert months("2024-03-10", "2024-03") == [3]
    assert months("2025", None) == []


@pytest.mark.parametrize(
    "filters",
    [
        Filters(date_from="yesterday"),
        Filters(date_to="2024-13"),
        Filters(date_to="2023-02-29"),
        Filters(date_from="2024-01-01' OR '1'='1"),
        Filters(date_from="2024-05", date_to="2024-04"),
        Filters(date_from="2024-05-02", date_to="2024-05-01"),
    ],
)
def test_dates_that_cannot_be_read_are_filter_errors(table: PassageTable, filters: Filters) -> None:
    with pytest.raises(FilterError):
        table.search_vector(QUERY, 3, at=2, filters=filters)


def test_a_vector_of_another_width_is_refused(table: PassageTable) -> None:
    for vector in (np.ones(E + 1, np.float32), np.full(E, np.nan, np.float32)):
        with pytest.raises(PassageError, match="expected finite numbers"):
            table.search_vector(vector, 3, at=1)


def test_an_approximate_index_is_built_when_there_are_rows_enough_and_survives_a_purge(
    table: PassageTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = [hit.id for hit in table.search_vector(QUERY, 5, at=2)]
    monkeypatch.setattr(PassageTable, "ann_rows", 20)
    table.optimize()
    assert [hit.id for hit in table.search_vector(QUERY, 5, at=2)] == exact
    table.purge(exact[:1])
    assert [hit.id for hit in table.search_vector(QUERY, 4, at=2)] == exact[1:]


def test_faiss_finds_what_the_table_finds(table: PassageTable) -> None:
    index = FaissIndex.build(table, 1, device="cpu")
    assert (index.at, index.device, len(index)) == (1, "cpu", 20)
    expected = table.search_vector(QUERY, 6, at=1)
    found = index.search(QUERY, 6)
    assert [name for name, _ in found] == [hit.id for hit in expected]
    np.testing.assert_allclose([score for _, score in found], [hit.score for hit in expected], rtol=1e-5)
    filters = Filters(source="a/*")
    filtered = index.candidates(table, QUERY, 3, filters=filters)
    assert [hit.id for hit in filtered] == [hit.id for hit in table.search_vector(QUERY, 3, at=1, filters=filters)]
    assert index.candidates(table, QUERY, 3, filters=Filters(source="nowhere")) == []
    assert index.search(QUERY, 0) == []
    assert len(index.search(QUERY, 99)) == 20
    with pytest.raises(RetrievalError, match="this index holds"):
        index.search(np.ones(E + 1, np.float32), 3)


def test_faiss_over_an_empty_snapshot_finds_nothing(table: PassageTable) -> None:
    index = FaissIndex.build(table, 0, device="cpu")
    assert index.search(QUERY, 3) == []
    assert index.candidates(table, QUERY, 3) == []


def test_two_faiss_packages_side_by_side_are_refused(table: PassageTable, monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        def __init__(self, name: str) -> None:
            self.name = name

    monkeypatch.setattr(metadata, "distributions", lambda: [Installed("faiss-cpu"), Installed("faiss_gpu")])
    with pytest.raises(ConfigError, match="pip uninstall faiss-cpu faiss-gpu"):
        FaissIndex.build(table, 1)
