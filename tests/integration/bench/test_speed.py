"""What the speed bench measures, on tiny models: equally long answers, every way in every round, forwards alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from knowstore.bench import SpeedConfig, can_plot, plot_speed, run_speed
from knowstore.config import ModelConfig
from knowstore.errors import ConfigError

CONFIG = SpeedConfig(n_passages=24, ks=(1, 2), rounds=2, n_tokens=3, sizes=(10,))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [{"title": f"Town {n}", "text": f"Town {n} lies on a river. It has {n} bridges."} for n in range(24)]
    file = tmp_path / "passages.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def test_every_way_is_measured_in_every_round(tiny_models: ModelConfig, corpus: Path, tmp_path: Path) -> None:
    found = run_speed(corpus, models=tiny_models, config=CONFIG, cache_dir=tmp_path)
    answers, ratios, codecs = found["answers"], found["ratios"], found["codecs"]
    assert isinstance(answers, list)
    assert isinstance(ratios, list)
    assert isinstance(codecs, list)
    assert [(row["method"], row["k"], row["n"]) for row in answers] == [
        ("bare", 0, 2), ("experts", 1, 2), ("experts", 2, 2), ("rag", 1, 2), ("rag", 2, 2),
    ]  # fmt: skip
    for row in answers:
        assert 0 < row["first_token_s"] < row["total_s"] <= row["ask_total_s"]
    sizes = {row["codec"]: row["bytes_per_passage"] for row in codecs}
    assert sizes["float32"] > sizes["float16"] > sizes["int8"] > sizes["latent"]
    by_name = {row["name"]: row["ratio"] for row in ratios}
    assert by_name["ingest_over_pure_forwards"] > 1
    if not can_plot():
        pytest.skip("extra `plots` is not installed")
    plot_speed(found, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_handful_of_passages_is_too_few_to_time(tiny_models: ModelConfig, tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text('{"title": "Rome", "text": "Rome lies on the Tiber."}\n' * 40, "utf-8")
    with pytest.raises(ConfigError, match="has 1 passages"):
        run_speed(file, models=tiny_models, config=CONFIG)
