"""What the speed bench measures, on tiny models: equally long answers, every way in every round, forwards alone."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knowstore._answering import Reader
from knowstore.bank import EncodedExpert, ExpertBank, StoredExpert
from knowstore.bench import SpeedConfig, can_plot, plot_speed, reads, run_speed
from knowstore.bench.startup import measure_startup
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError
from knowstore.records import Hit

CONFIG = SpeedConfig(n_passages=24, ks=(1, 2), rounds=2, n_tokens=3, sizes=(10,))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [{"title": f"Town {n}", "text": f"Town {n} lies on a river. It has {n} bridges."} for n in range(24)]
    file = tmp_path / "passages.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def test_every_way_is_measured_in_every_round(
    tiny_models: ModelConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieve, kept = Reader.retrieve, list[int]()

    def noted(reader: Reader, *arguments: Any, n_best: int) -> list[Hit]:
        kept.append(n_best)
        return retrieve(reader, *arguments, n_best=n_best)

    monkeypatch.setattr(Reader, "retrieve", noted)
    found = run_speed(corpus, models=tiny_models, config=CONFIG, cache_dir=tmp_path)
    answers, ratios, codecs = found["answers"], found["ratios"], found["codecs"]
    assert isinstance(answers, list)
    assert isinstance(ratios, list)
    assert isinstance(codecs, list)
    assert [(row["method"], row["k"], row["n"]) for row in answers] == [
        ("bare", 0, 2), *((mode, k, 2) for mode in ("experts", "hybrid", "rag") for k in (1, 2)),
    ]  # fmt: skip
    assert Counter(kept) == {0: 6, 1: 3, 2: 3}  # mounted and read alone, in two rounds and the one that warms up
    for row in answers:
        assert 0 < row["first_token_s"] < row["total_s"] <= row["ask_total_s"]
    sizes = {row["codec"]: row["bytes_per_passage"] for row in codecs}
    assert sizes["float32"] > sizes["float16"] > sizes["int8"] > sizes["latent"]
    by_name = {row["name"]: row["ratio"] for row in ratios}
    assert by_name["ingest_over_pure_forwards"] > 1
    for mode in ("experts", "hybrid"):
        assert {f"ttft_rag_over_{mode}_k2", f"total_rag_over_{mode}_k2", f"{mode}_k2_over_bare"} <= by_name.keys()
    if not can_plot():
        pytest.skip("extra `plots` is not installed")
    plot_speed(found, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_no_answer_is_measured_with_more_passages_than_there_are(tiny_models: ModelConfig, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="answers with 25 passages cannot be measured with 24 passages"):
        run_speed(corpus, models=tiny_models, config=replace(CONFIG, ks=(25, 1)))


def test_settings_of_the_environment_are_kept_from_the_command_that_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KNOWSTORE_CATALOG", "postgresql://nobody@nowhere/nothing")
    command = [
        sys.executable,
        "-c",
        "import os, sys; sys.exit(any(name.startswith('KNOWSTORE_') for name in os.environ))",
    ]
    assert measure_startup(command, tmp_path, "Who?").keys() == {"help_s", "first_ask_s"}


def test_banks_are_read_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"up": np.ones((4, 2), np.float32), "down": np.ones((2, 4), np.float32)}
    expert = EncodedExpert.make(StoredExpert("0" * 32, "neurons", tensors, (2,), 2), "float16", "made", 1)
    get, read = ExpertBank.get, list[ExpertBank]()
    monkeypatch.setattr(ExpertBank, "get", lambda bank, ids: read.append(bank) or get(bank, ids))
    monkeypatch.setattr(reads, "_N_READS", 4)
    monkeypatch.setattr(reads, "_N_BEFORE", 1)
    rows, ratios = reads.measure_reads([expert], (30, 20))
    n_places = len(rows) // 2
    rounds = [read[first : first + 2 * n_places] for first in range(0, len(read), 2 * n_places)]
    assert [len(set(some)) for some in rounds] == [2] * 5
    assert {(row["experts"], row["n"]) for row in rows} == {(20, 4), (30, 4)}
    assert {row["name"] for row in ratios} >= {"read_system_30_over_20", "read_memory_30_over_20"}


def test_a_handful_of_passages_is_too_few_to_time(tiny_models: ModelConfig, tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text('{"title": "Rome", "text": "Rome lies on the Tiber."}\n' * 40, "utf-8")
    with pytest.raises(ConfigError, match="has 1 passages"):
        run_speed(file, models=tiny_models, config=CONFIG)
