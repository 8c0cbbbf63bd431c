"""The passages table on a real LanceDB table: what is visible when, and what purge leaves."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from knowstore.errors import PassageError
from knowstore.passages import PassageRow, PassageTable
from knowstore.records import Passage

E = 8
NASTY_TEXTS = ["it's", "a\\'b", "''", "x' OR '1'='1", "日本語", "🙂", "100 % _", "-- DROP", "new\nline", "e\u0301"]


def _row(text: str, *, title: str = "", source: str = "", date: str = "", seed: int = 0) -> PassageRow:
    rng = np.random.default_rng([seed, *text.encode()])
    vector, segment_vectors = rng.standard_normal(E).astype(np.float32), rng.standard_normal((2, E)).astype(np.float32)
    half = len(text) // 2
    return PassageRow(Passage(text, title, source, date), vector, [(0, half), (half, len(text))], segment_vectors)


def _id(text: str) -> str:
    return Passage(text).passage_id


def _visible(table: PassageTable, at: int) -> set[str]:
    return {text for batch in table.iter_rows(at, ["text"]) for text in batch.column("text").to_pylist()}


def _files_with(folder: Path, needle: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes()]


@pytest.fixture
def table(tmp_path: Path) -> PassageTable:
    return PassageTable.open(str(tmp_path), dim=E, create=True)


def test_rows_come_back_as_they_were_added(table: PassageTable, tmp_path: Path) -> None:
    rows = [_row("one", title="T", source="a.txt", date="2024-05-01"), _row("two"), _row("three")]
    assert table.add([*rows, _row("one", title="T", seed=9)], 1) == 3
    for reader in (table, PassageTable.open(str(tmp_path))):
        assert reader.dim == E
        found = reader.get([rows[2].passage.passage_id, "nothing", rows[0].passage.passage_id], at=1)
        assert [row.passage.text for row in found] == ["three", "one"]
        assert found[1].passage == rows[0].passage
        assert found[1].segments == ((0, 1), (1, 3))
        assert np.array_equal(found[1].vector, rows[0].vector)
        np.testing.assert_allclose(found[1].segment_vectors, rows[0].segment_vectors, atol=2e-3)
    assert table.get([], at=1) == []
    assert table.size_bytes() > 0


def test_staged_rows_are_visible_only_from_their_batch_on(table: PassageTable) -> None:
    table.add([_row("old")], 1)
    table.add([_row("new")], 2)
    table.retire([_id("old")], 2)
    assert _visible(table, 0) == set()
    assert _visible(table, 1) == {"old"}
    assert _visible(table, 2) == {"new"}
    assert (table.count(None), table.count(1), table.count(2)) == (2, 1, 1)
    assert table.staged_ids(2) == {_id("new")}
    assert table.existing([_id("old"), _id("new"), "other"]) == {_id("old"), _id("new")}


def test_the_latest_table_stays_as_it_is_until_a_purge(table: PassageTable) -> None:
    table.add([_row("one"), _row("two")], 1)
    seen = table.latest()
    assert seen.latest() is seen
    table.retire([_id("one")], 2)
    table.revive([_id("one")], 3)
    assert (_visible(seen, 1), _visible(seen.latest(), 1)) == ({"one", "two"}, {"two"})
    table.purge([_id("two")])
    with pytest.raises(PassageError, match="could not be read"):
        seen.get([_id("one")], at=1)
    assert _visible(seen.latest(), 3) == {"one"}


def test_discard_takes_back_additions_and_removals_and_may_be_repeated(table: PassageTable) -> None:
    table.add([_row("kept"), _row("gone")], 1)
    table.retire([_id("gone")], 2)
    table.add([_row("new"), _row("gone")], 3)
    table.retire([_id("kept")], 3)
    for _ in range(2):
        table.discard(3, keep={_id("gone")})
        assert _visible(table, 2) == _visible(table, 3) == _visible(table, 9) == {"kept"}
        assert table.existing([_id("gone"), _id("new")]) == {_id("gone")}
    table.add([_row("gone")], 4)
    assert _visible(table, 4) == {"kept", "gone"}


def test_a_removed_passage_is_revived_with_the_bytes_it_had(table: PassageTable) -> None:
    table.add([_row("text", seed=1)], 1)
    table.retire([_id("text")], 2)
    assert table.add([_row("text", seed=2)], 3) == 0
    assert _visible(table, 2) == set()
    (row,) = table.get([_id("text")], at=3)
    assert row.live_from == 3
    assert np.array_equal(row.vector, _row("text", seed=1).vector)


def test_a_live_passage_stays_visible_when_a_staged_batch_adds_it_again(table: PassageTable) -> None:
    table.add([_row("text")], 1)
    table.add([_row("text")], 2)
    assert _visible(table, 1) == {"text"}
    assert table.staged_ids(2) == set()


def test_a_removal_can_be_revived_in_its_own_batch(table: PassageTable) -> None:
    table.add([_row("text")], 1)
    assert table.retire([_id("text")], 2) == 1
    assert table.retire([_id("text")], 2) == 0
    assert table.revive([_id("text")], 2) == 1
    assert _visible(table, 1) == _visible(table, 2) == {"text"}


def test_source_can_be_set(table: PassageTable) -> None:
    table.add([_row("text", source="a")], 1)
    assert table.set_source(_id("text"), "it's \\' new") == 1
    assert table.get([_id("text")], at=1)[0].passage.source == "it's \\' new"
    assert table.set_source("x' OR '1'='1", "other") == 0


def test_texts_of_any_script_come_back_and_are_found(table: PassageTable) -> None:
    table.add([_row(text, source=text) for text in NASTY_TEXTS], 1)
    assert _visible(table, 1) == set(NASTY_TEXTS)
    for text in NASTY_TEXTS:
        (row,) = table.get([_row(text).passage.passage_id], at=1)
        assert row.passage.text == text


def test_ids_that_look_like_sql_name_nothing_else(table: PassageTable) -> None:
    table.add([_row("text")], 1)
    for attack in ["' OR 1=1 --", "\\' OR 1=1 --", "'') OR (''=''", "x' OR id <> '"]:
        assert table.get([attack], at=1) == []
        assert table.retire([attack], 2) == 0
        assert table.existing([attack]) == set()
        table.purge([attack])
        assert table.count(1) == 1


def test_another_process_sees_writes_after_refresh(table: PassageTable, tmp_path: Path) -> None:
    reader = PassageTable.open(str(tmp_path))
    table.add([_row("text")], 1)
    assert reader.count(1) == 0
    reader.refresh()
    assert reader.count(1) == 1
    assert reader.version == table.version


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PassageRow(Passage("t"), np.ones(3, np.float32), [], np.empty((0, E), np.float32)), r"vector is \(3,\)"),
        (PassageRow(Passage("t"), np.full(E, np.nan, np.float32), [], np.empty((0, E), np.float32)), "finite"),
        (PassageRow(Passage("t"), np.ones(E, np.float32), [(0, 1)], np.ones((2, E), np.float32)), r"expected \(1, 8\)"),
        (PassageRow(Passage("t"), np.ones(E, np.float32), [(0, 2)], np.ones((1, E), np.float32)), "outside the text"),
        (PassageRow(Passage("t"), np.ones(E, np.float32), [(0, 1)], np.full((1, E), 1e6, np.float32)), "float16"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_nothing_is_written(
    table: PassageTable, row: PassageRow, expected: str
) -> None:
    with pytest.raises(PassageError, match=expected):
        table.add([_row("good"), row], 1)
    assert table.count(None) == 0


def test_absent_damaged_and_unsuitable_tables_are_passage_errors(table: PassageTable, tmp_path: Path) -> None:
    with pytest.raises(PassageError, match="no passages table"):
        PassageTable.open(str(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(PassageError, match="width 8, the retriever makes 9"):
        PassageTable.open(str(tmp_path), dim=9)
    table.add([_row("text")], 1)
    for path in (tmp_path / "passages.lance" / "data").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(PassageError, match="could not be read"):
        PassageTable.open(str(tmp_path)).get([_id("text")], at=1)
    for path in (tmp_path / "passages.lance" / "_versions").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(PassageError, match="cannot be read"):
        PassageTable.open(str(tmp_path))


def test_purged_text_vectors_and_tokens_are_in_no_file(table: PassageTable, tmp_path: Path) -> None:
    secret = _row("the zebraneedle text", title="Quaggatitle", source="okapisource")
    others = [_row(f"ordinary passage number {i}") for i in range(60)]
    table.add([*others, secret], 1)
    table.optimize()
    table.retire([secret.passage.passage_id], 2)  # a second copy of the row
    needles = [b"zebraneedle", b"Quaggatitle", b"okapisource", secret.vector.tobytes()]
    needles.append(secret.segment_vectors.astype(np.float16).tobytes())
    needles.append(secret.passage.passage_id.encode())
    assert all(_files_with(tmp_path, needle) for needle in needles)
    reader = PassageTable.open(str(tmp_path))
    assert reader.count(1) == 61
    table.purge([secret.passage.passage_id])
    assert not any(_files_with(tmp_path, needle) for needle in needles)
    assert _files_with(tmp_path, b"ordinary passage number 7")
    assert [len(found.search_text("zebraneedle", 5, at=1)) for found in (table, reader)] == [0, 0]
    assert table.search_text("ordinary number 7", 1, at=1)[0].text == "ordinary passage number 7"
    assert table.count(None) == 60
    assert sorted(_visible(reader, 1)) == sorted(row.passage.text for row in others)


def test_after_a_purge_results_are_those_of_a_table_that_never_held_it(tmp_path: Path) -> None:
    rows = [_row(f"common words of passage {i}", title=f"Title {i}") for i in range(30)]
    secret = _row("common words of the secret")
    purged, clean = (PassageTable.open(str(tmp_path / name), dim=E, create=True) for name in ("purged", "clean"))
    purged.add([*rows[:10], secret, *rows[10:]], 1)
    clean.add(rows, 1)
    purged.purge([secret.passage.passage_id])
    clean.optimize(retrain=True)
    query = np.ones(E, np.float32)
    found = [
        [(hit.id, hit.score, hit.vector_score) for hit in table.search_hybrid(query, "common passage 7", 9, at=1)]
        for table in (purged, clean)
    ]
    assert found[0] == found[1]


def test_every_row_can_be_purged_and_the_table_used_again(table: PassageTable, tmp_path: Path) -> None:
    table.add([_row("the zebraneedle text")], 1)
    table.purge([_id("the zebraneedle text")])
    assert table.count(None) == 0
    assert not _files_with(tmp_path, b"zebraneedle")
    assert table.search_text("text", 3, at=1) == []
    table.add([_row("the zebraneedle text")], 2)
    assert len(table.search_text("zebraneedle", 3, at=2)) == 1


def test_many_small_edits_take_few_times_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*.lance") if file.is_file())

    rows = [_row(f"passage {i} " + "of many words " * 40) for i in range(600)]
    at_once, in_parts = (PassageTable.open(str(tmp_path / name), dim=E, create=True) for name in ("once", "parts"))
    at_once.add(rows, 1)
    at_once.optimize()
    for batch in range(60):
        in_parts.add(rows[10 * batch : 10 * batch + 10], batch + 1)
        in_parts.optimize()
        assert in_parts.search_text(f"passage {10 * batch}", 1, at=99)[0].id == rows[10 * batch].passage.passage_id
    assert written(tmp_path / "parts") < 6 * written(tmp_path / "once")
    reader = in_parts.latest()
    monkeypatch.setattr("knowstore.passages.table._HISTORY", timedelta(milliseconds=1))
    in_parts.optimize(retrain=True)
    assert written(tmp_path / "parts") < 1.5 * written(tmp_path / "once")
    assert reader.latest().count(99) == in_parts.count(99) == 600
