"""The expert bank on a real LanceDB table."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from lancedb.table import LanceTable

from knowstore.bank import ExpertBank, StoredExpert
from knowstore.errors import BankError, ExpertChecksumError, FingerprintError

D, R = 16, 4
NASTY_IDS = ["a'b", "a\\'b", "''", "x' OR '1'='1", "日本語", "🙂", "%", "--", "new\nline"]


def _expert(passage_id: str, seed: int = 0) -> StoredExpert:
    rng = np.random.default_rng(seed)
    tensors = {"up": rng.standard_normal((D, R)), "down": rng.standard_normal((R, D))}
    return StoredExpert(passage_id, "neurons", {k: v.astype(np.float32) for k, v in tensors.items()}, (1, 3), R)


@pytest.fixture
def bank(tmp_path: Path) -> ExpertBank:
    return ExpertBank.open(str(tmp_path), fingerprint="print", create=True)


def _files_with(folder: Path, needle: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes()]


def test_experts_come_back_as_they_were_added(bank: ExpertBank, tmp_path: Path) -> None:
    experts = [_expert(f"p{i}", i) for i in range(5)]
    assert bank.add(experts, "float32", batch_id=7) == 5
    for reader in (bank, ExpertBank.open(str(tmp_path), fingerprint="print")):
        found = reader.get(["p3", "p0", "p3"])
        assert list(found) == ["p3", "p0"]
        assert found["p3"].segment_ranks == (1, 3)
        assert found["p3"].form == "neurons"
        assert np.array_equal(found["p3"].tensors["up"], experts[3].tensors["up"])
    assert bank.count() == 5
    assert bank.existing(["p1", "nothing"]) == {"p1"}
    assert bank.ids_of_batch(7) == {f"p{i}" for i in range(5)}
    assert bank.bytes_per_expert() > 2 * D * R * 4


def test_a_bank_whose_making_was_cut_short_gets_its_key_when_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(LanceTable, "set_unenforced_primary_key", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ExpertBank.open(str(tmp_path), fingerprint="print", create=True)
    bank = ExpertBank.open(str(tmp_path), fingerprint="print", create=True)
    assert bank._table.schema.field("id").metadata


def test_the_latest_bank_stays_as_it_is_until_a_purge(bank: ExpertBank) -> None:
    bank.add([_expert("p", 1), _expert("q", 2)], "float32", batch_id=1)
    seen = bank.latest()
    assert seen.latest() is seen
    bank.add([_expert("p", 3)], "float32", batch_id=2)
    bank.delete(["q"])
    assert np.array_equal(seen.get(["p"])["p"].tensors["up"], _expert("p", 1).tensors["up"])
    assert (seen.count(), seen.latest().count()) == (2, 1)
    bank.purge(["q"])
    with pytest.raises(BankError, match="could not be read"):
        seen.get(["q"])


def test_latents_come_back_as_named_arrays(bank: ExpertBank) -> None:
    tensors = {"codes": np.ones((3, 128), np.float32), "ids": np.array([1, 2, 49000], np.int32)}
    bank.add([StoredExpert("p", "latent", tensors, (), 8)], "latent", batch_id=1)
    found = bank.get(["p"])["p"]
    assert found.rank == 8
    assert found.tensors["ids"].tolist() == [1, 2, 49000]
    np.testing.assert_allclose(found.tensors["codes"], 1.0, rtol=1e-3)
    with pytest.raises(BankError, match="codec latent cannot hold"):
        bank.add([_expert("q")], "latent", batch_id=1)


def test_an_expert_that_is_added_again_is_replaced(bank: ExpertBank) -> None:
    bank.add([_expert("a", 1), _expert("b", 2)], "float32", batch_id=1)
    bank.get(["a"])
    bank.add([_expert("a", 3), _expert("c", 4)], "float32", batch_id=2)
    assert bank.count() == 3
    assert np.array_equal(bank.get(["a"])["a"].tensors["up"], _expert("a", 3).tensors["up"])
    assert bank.ids_of_batch(2) == {"a", "c"}


def test_ids_with_quotes_and_any_script_name_only_themselves(bank: ExpertBank) -> None:
    bank.add([_expert(passage_id) for passage_id in NASTY_IDS], "float16", batch_id=1)
    for passage_id in NASTY_IDS:
        assert list(bank.get([passage_id])) == [passage_id]
        assert bank.existing([passage_id]) == {passage_id}
    for n_left, passage_id in reversed(list(enumerate(NASTY_IDS))):
        assert bank.delete([passage_id]) == 1
        assert bank.count() == n_left


def test_an_id_with_half_a_character_names_nothing(bank: ExpertBank) -> None:
    assert bank.existing(["bytes\udcff"]) == set()
    assert list(bank.iter_encoded(["bytes\udcff"])) == []


def test_a_missing_expert_is_an_error_unless_allowed(bank: ExpertBank) -> None:
    bank.add([_expert("a")], "float16", batch_id=1)
    with pytest.raises(BankError, match="nothing first"):
        bank.get(["a", "nothing"])
    assert list(bank.get(["a", "nothing"], allow_missing=True)) == ["a"]
    assert bank.get([]) == {}


def test_experts_of_another_hypernetwork_are_refused(bank: ExpertBank, tmp_path: Path) -> None:
    bank.add([_expert("a")], "float16", batch_id=1)
    other = ExpertBank.open(str(tmp_path), fingerprint="other")
    with pytest.raises(FingerprintError, match="made for print"):
        other.get(["a"])
    anyone = ExpertBank.open(str(tmp_path), fingerprint=None)
    assert list(anyone.get(["a"])) == ["a"]
    with pytest.raises(BankError, match="without a fingerprint"):
        anyone.add([_expert("b")], "float16", batch_id=1)
    assert [passage_id for passage_id, _ in other.verify()] == ["a"]


def test_bytes_changed_on_disk_are_noticed(bank: ExpertBank, tmp_path: Path) -> None:
    bank.add([_expert("a", 1), _expert("b", 2)], "float32", batch_id=1)
    needle = _expert("a", 1).tensors["up"].tobytes()
    (path,) = _files_with(tmp_path, needle)
    content = path.read_bytes()
    path.write_bytes(content.replace(needle, bytes([needle[0] ^ 1]) + needle[1:]))
    reader = ExpertBank.open(str(tmp_path), fingerprint="print")
    assert list(reader.get(["b"])) == ["b"]
    with pytest.raises(ExpertChecksumError, match="passage a has checksum"):
        reader.get(["a"])
    (problem,) = reader.verify()
    assert problem[0] == "a"
    assert isinstance(problem[1], ExpertChecksumError)


def test_verify_is_silent_about_a_sound_bank_and_names_what_is_missing(bank: ExpertBank) -> None:
    bank.add([_expert(f"p{i}", i) for i in range(10)], "int8", batch_id=1)
    assert list(bank.verify()) == []
    assert [passage_id for passage_id, _ in bank.verify(["p1", "gone"])] == ["gone"]


def test_a_damaged_or_absent_table_is_a_bank_error(bank: ExpertBank, tmp_path: Path) -> None:
    with pytest.raises(BankError, match="no expert bank"):
        ExpertBank.open(str(tmp_path / "elsewhere"), fingerprint=None)
    assert not (tmp_path / "elsewhere").exists()
    for path in (tmp_path / "experts.lance" / "_versions").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(BankError, match="cannot be read"):
        ExpertBank.open(str(tmp_path), fingerprint=None)


def test_memory_keeps_the_most_recently_used_within_its_bytes(tmp_path: Path) -> None:
    size = _expert("x").size_bytes
    bank = ExpertBank.open(str(tmp_path), fingerprint="print", create=True, cache_bytes=2 * size + 10)
    bank.add([_expert(name, i) for i, name in enumerate("abc")], "float32", batch_id=1)
    bank.get(["a"])
    bank.get(["b"])
    bank.get(["a"])
    bank.get(["c"])  # b goes
    info = bank.cache_info()
    assert (info.hits, info.misses, info.n_experts, info.size_bytes) == (1, 3, 2, 2 * size)
    bank.get(["a", "c"])
    assert bank.cache_info().hits == 3
    bank.get(["b"])
    assert bank.cache_info().misses == 4
    bank.delete(["b"])
    with pytest.raises(BankError):
        bank.get(["b"])


def test_memory_of_no_bytes_still_serves(tmp_path: Path) -> None:
    bank = ExpertBank.open(str(tmp_path), fingerprint="print", create=True, cache_bytes=0)
    bank.add([_expert("a")], "float32", batch_id=1)
    assert list(bank.get(["a"])) == list(bank.get(["a"])) == ["a"]
    assert bank.cache_info().n_experts == 0


def test_threads_read_the_same_experts(bank: ExpertBank) -> None:
    ids = [f"p{i}" for i in range(20)]
    bank.add([_expert(passage_id, i) for i, passage_id in enumerate(ids)], "float32", batch_id=1)
    expected = {passage_id: _expert(passage_id, i).tensors["up"] for i, passage_id in enumerate(ids)}

    def is_right(start: int) -> bool:
        found = bank.get(ids[start : start + 5])
        return all(np.array_equal(expert.tensors["up"], expected[passage_id]) for passage_id, expert in found.items())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, list(range(15)) * 3))


def test_purged_tensors_are_in_no_file(bank: ExpertBank, tmp_path: Path) -> None:
    experts = [_expert(f"passage-{i:02}", i) for i in range(40)]
    bank.add(experts, "float32", batch_id=1)
    bank.add([replace(experts[3], segment_ranks=(4,)), _expert("later", 99)], "float32", batch_id=2)
    bank.optimize()
    bank.delete(["passage-05"])
    needles = [experts[i].tensors[name].tobytes() for i in (3, 5) for name in ("up", "down")]
    assert all(_files_with(tmp_path, needle) for needle in needles)
    reader = ExpertBank.open(str(tmp_path), fingerprint="print")
    assert reader.count() == 40
    bank.purge(["passage-03", "passage-05"])
    assert not any(_files_with(tmp_path, needle) for needle in needles)
    assert not _files_with(tmp_path, b"passage-03")
    assert _files_with(tmp_path, experts[4].tensors["up"].tobytes())
    assert bank.count() == 39
    assert list(bank.verify()) == []
    assert list(reader.get(["passage-04"])) == ["passage-04"]  # its version is gone, so it moves on
    reader.refresh()
    assert reader.version == bank.version


def test_the_last_expert_can_be_purged_and_the_bank_used_again(bank: ExpertBank, tmp_path: Path) -> None:
    bank.add([_expert("a", 1)], "float32", batch_id=1)
    bank.purge(["a"])
    assert bank.count() == 0
    assert bank.bytes_per_expert() == 0.0
    assert not _files_with(tmp_path, _expert("a", 1).tensors["up"].tobytes())
    bank.add([_expert("a", 1)], "float32", batch_id=2)
    assert bank.ids_of_batch(2) == {"a"}


def test_encoded_experts_move_to_another_bank_unchanged(bank: ExpertBank, tmp_path: Path) -> None:
    bank.add([_expert(f"p{i}", i) for i in range(5)], "int8", batch_id=1)
    encoded = list(bank.iter_encoded(["p1", "p2"]))
    other = ExpertBank.open(str(tmp_path / "other"), fingerprint="print", create=True)
    assert other.add_encoded(encoded, batch_id=9) == 2
    assert other.ids_of_batch(9) == {"p1", "p2"}
    assert np.array_equal(other.get(["p1"])["p1"].tensors["up"], bank.get(["p1"])["p1"].tensors["up"])
    with pytest.raises(ExpertChecksumError):
        other.add_encoded([replace(encoded[0], data=encoded[0].data + b"x")], batch_id=9)
    with pytest.raises(FingerprintError):
        other.add_encoded([replace(encoded[0], fingerprint="foreign")], batch_id=9)
    assert len(list(bank.iter_encoded())) == 5


def test_a_small_edit_leaves_the_files_of_the_bank_alone(
    bank: ExpertBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.lance") if file.is_file()}

    bank.add([_expert("first", 1)], "float16", batch_id=1)
    bank.optimize()
    before = files()
    bank.add([_expert("second", 2)], "float16", batch_id=2)
    bank.optimize()
    after = files()
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()
    monkeypatch.setattr("knowstore.bank.bank._MOST_FILES", 1)
    bank.optimize()
    assert len(files()) == len(after) + 1
    monkeypatch.setattr("knowstore.bank.bank._HISTORY", timedelta(milliseconds=1))
    bank.add([_expert("third", 3)], "float16", batch_id=3)
    time.sleep(0.05)  # what was written within the last millisecond would stay
    bank.optimize()
    assert len(files()) == 1
    assert set(bank.get(["first", "second", "third"])) == {"first", "second", "third"}


def test_a_bank_with_many_ids_keeps_an_index_of_them(bank: ExpertBank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knowstore.bank.bank._ID_INDEX_ROWS", 3)
    for batch in range(3):
        bank.add([_expert(f"passage-{batch}-{i}", i) for i in range(2)], "float16", batch_id=batch)
        bank.optimize()
    assert list(bank.get(["passage-2-1", "passage-0-0"])) == ["passage-2-1", "passage-0-0"]
