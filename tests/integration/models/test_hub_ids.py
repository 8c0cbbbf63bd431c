from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from knowstore.errors import ModelNotFoundError
from knowstore.models import locate, resolve

COMMIT = "0" * 40


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_fetched_hub_id_resolves_without_a_network(hub_cache: Path, tmp_path: Path) -> None:
    snapshot = hub_cache / "models--some--encoder" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (hub_cache / "models--some--encoder" / "refs").mkdir()
    (hub_cache / "models--some--encoder" / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"weights")
    found = resolve("some/encoder", "retriever", cache_dir=tmp_path)
    assert (found.path, found.origin, found.name) == (snapshot, "hub", "some/encoder")


@pytest.mark.usefixtures("hub_cache")
def test_hub_id_without_a_network_is_an_error_that_says_how_to_get_it(tmp_path: Path) -> None:
    for find in (locate, resolve):
        with pytest.raises(ModelNotFoundError, match="models pull some/encoder"):
            find("some/encoder", "retriever", cache_dir=tmp_path)
