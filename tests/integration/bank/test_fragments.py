"""Experts that many processes write and one commits, on a real LanceDB table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from knowstore.bank import EncodedExpert, ExpertBank, StoredExpert, write_fragment
from knowstore.errors import BankError

pytest.importorskip("lance", reason="extra `ray` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")


def _expert(passage_id: str, seed: int = 0) -> EncodedExpert:
    rng = np.random.default_rng(seed)
    tensors = {"up": rng.standard_normal((16, 4)), "down": rng.standard_normal((4, 16))}
    made = StoredExpert(passage_id, "neurons", {k: v.astype(np.float32) for k, v in tensors.items()}, (), 4)
    return EncodedExpert.make(made, "float16", "print", batch_id=seed)


@pytest.fixture
def bank(tmp_path: Path) -> ExpertBank:
    return ExpertBank.open(str(tmp_path), fingerprint="print", create=True)


def _written(bank: ExpertBank) -> dict[str, EncodedExpert]:
    found = list(bank.iter_encoded())
    assert len({expert.passage_id for expert in found}) == len(found)
    return {expert.passage_id: expert for expert in found}


def test_nobody_sees_a_fragment_before_it_is_committed_and_everybody_afterwards(bank: ExpertBank) -> None:
    first, second, reader = [_expert("a", 1), _expert("b", 2)], [_expert("c", 3)], bank.latest()
    written = [line for part in (first, second) for line in write_fragment(bank.uri, bank.name, part)]
    assert (bank.count(), bank.latest().count()) == (0, 0)
    before = bank.version
    bank.commit_fragments(written, ["a", "b", "c"])
    assert (bank.version, reader.count()) == (before + 1, 0)
    assert _written(bank) == _written(bank.latest()) == {one.passage_id: one for one in (*first, *second)}
    assert list(bank.verify()) == []


def test_an_expert_that_is_stored_already_is_replaced(bank: ExpertBank) -> None:
    bank.add_encoded([_expert("a", 1), _expert("b", 2)], batch_id=1)
    assert bank.get(["a"])  # now in memory as well
    bank.commit_fragments(write_fragment(bank.uri, bank.name, [_expert("a", 3)]), ["a"])
    assert _written(bank)["a"] == _expert("a", 3)
    assert np.array_equal(bank.get(["a"])["a"].tensors["up"], _expert("a", 3).decode().tensors["up"])
    assert bank.count() == 2


def test_what_was_never_committed_goes_away_and_older_versions_stay(bank: ExpertBank, tmp_path: Path) -> None:
    bank.add_encoded([_expert("a", 1)], batch_id=1)
    older = bank.latest()
    bank.delete(["a"])
    bank.add_encoded([_expert("b", 2)], batch_id=2)
    files = {path.name for path in (tmp_path / "experts.lance" / "data").iterdir()}
    write_fragment(bank.uri, bank.name, [_expert("c", 3)])
    bank.sweep()
    assert {path.name for path in (tmp_path / "experts.lance" / "data").iterdir()} == files
    assert (set(older.get(["a"])), bank.ids()) == ({"a"}, {"b"})


def test_a_purge_takes_fragments_that_were_never_committed(bank: ExpertBank, tmp_path: Path) -> None:
    secret = replace(_expert("a", 1), data=b"needle in the tensors")
    write_fragment(bank.uri, bank.name, [secret])
    assert any(b"needle" in path.read_bytes() for path in (tmp_path / "experts.lance").rglob("*") if path.is_file())
    bank.purge(["a"])
    assert not any(b"needle" in path.read_bytes() for path in (tmp_path / "experts.lance").rglob("*") if path.is_file())


def test_a_fragment_that_is_not_here_is_refused(bank: ExpertBank, tmp_path: Path) -> None:
    elsewhere = ExpertBank.open(str(tmp_path / "elsewhere"), fingerprint="print", create=True)
    [written] = write_fragment(elsewhere.uri, elsewhere.name, [_expert("a", 1)])
    assert json.loads(written)["physical_rows"] == 1
    with pytest.raises(BankError, match="do all of them see this folder"):
        bank.commit_fragments([written], ["a"])
    assert (bank.count(), list(bank.verify())) == (0, [])


def test_there_must_be_a_bank_to_write_beside(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="could not be written beside the bank"):
        write_fragment(str(tmp_path / "none"), "experts", [_expert("a", 1)])
    assert list(tmp_path.iterdir()) == []
