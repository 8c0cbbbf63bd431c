"""Probes files: every row that is a probe is read, every other one is named with the reason."""

import gzip
import json
from pathlib import Path

import pytest

from knowstore.audits import read_probes
from knowstore.errors import SourceError
from knowstore.records import Probe

GOOD = {"question": "Wo liegt Köln?", "answers": ["am Rhein"], "kind": "reliability"}
BAD: dict[str, object] = {
    "no question": {**GOOD, "question": " "},
    "question": {**GOOD, "question": 7},
    "kind is 'truth'": {**GOOD, "kind": "truth"},
    "kind is None": {"question": "Who?", "answers": ["me"]},
    "no answers": {**GOOD, "answers": []},
    "no list": {**GOOD, "answers": "am Rhein"},
    "no list of texts": {**GOOD, "answers": ["am Rhein", None]},
    "passage_id": {**GOOD, "passage_id": 3},
    "no object": [GOOD],
    "NUL": {**GOOD, "question": "Wo\0?"},
    "surrogates": {**GOOD, "question": "Wo \ud800?"},
}


def test_good_rows_are_read_among_bad_ones(tmp_path: Path) -> None:
    file = tmp_path / "probes.jsonl.gz"
    lines = [json.dumps(row).encode() for row in (GOOD, *BAD.values())]
    lines += [
        b"",
        b"{",
        b'{"question": "\xff"}',
        b"[" * 100_000,
        b"\xef\xbb\xbf" + json.dumps({**GOOD, "passage_id": "a" * 32}).encode(),
    ]
    with gzip.open(file, "wb") as out:
        out.write(b"\n".join(lines))
    found = read_probes(file)
    probe = Probe("Wo liegt Köln?", ("am Rhein",), "reliability")
    assert found.rows == (
        (f"{file}:1", probe),
        (f"{file}:17", Probe(*(probe.question, probe.answers, probe.kind), "a" * 32)),
    )
    assert [one.source for one in found.failures] == [f"{file}:{n}" for n in (*range(2, 13), 14, 15, 16)]
    for failure, reason in zip(found.failures, (*BAD, "no JSON", "no JSON", "no JSON"), strict=True):
        assert reason in failure.error


def test_locality_probes_need_no_answers(tmp_path: Path) -> None:
    file = tmp_path / "probes.jsonl"
    file.write_text(json.dumps({"question": "Who wrote Faust?", "answers": [], "kind": "locality"}), "utf-8")
    assert len(read_probes(file).rows) == 1


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere\.jsonl cannot be read"):
        read_probes(tmp_path / "nowhere.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"question": "x"}\n' * 99)[:-12])
    with pytest.raises(SourceError, match=r"cut\.jsonl\.gz"):
        read_probes(tmp_path / "cut.jsonl.gz")
