"""What codecs cost, on tiny models: experts go through a real bank, and float32 loses nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from knowstore._loaded import LoadedModels
from knowstore.bench import run_codecs
from knowstore.config import ModelConfig


@pytest.mark.parametrize("kind", ["tokens", "pooled"])
def test_each_codec_is_compared_with_float32(
    tiny_models: ModelConfig, tiny_pooled_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    generate, generated = LoadedModels.generate, list[str]()

    def noted(models: LoadedModels, ids: list[str], *arguments: Any, **options: Any) -> Any:
        generated.extend(ids)
        return generate(models, ids, *arguments, **options)

    monkeypatch.setattr(LoadedModels, "generate", noted)
    rows = [
        {"question": f"Where does {name} lie?", "answers": ["place"], "passage": {"title": name, "text": f"In {name}."}}
        for name in ("Rome", "Lyon", "Rome")
    ]
    file = tmp_path / "qa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    folder = tiny_models.hypernetwork if kind == "tokens" else str(tiny_pooled_dir)
    found = run_codecs([file], models=replace(tiny_models, hypernetwork=folder), limit=3, max_tokens=2)["rows"]
    assert isinstance(found, list)
    assert [row["codec"] for row in found] == ["float32", "float16", "int8", "latent"]
    sizes = [row["bytes_per_passage"] for row in found]
    assert sizes == sorted(sizes, reverse=True)
    assert (found[0]["same_answers"], found[0]["em_lost"], found[0]["em_lost_ci"]) == (1.0, 0.0, (0.0, 0.0))
    assert len(generated) == 3  # once for all codecs
    assert all(row["n"] == 3 and 0 <= row["same_answers"] <= 1 for row in found)
