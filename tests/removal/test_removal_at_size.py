"""The removal measurement at size; the suite has a small one among the store's tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.removal.measure import measure

if TYPE_CHECKING:
    from knowstore.config import ModelConfig


@pytest.mark.timeout(0)
def test_nothing_is_left_of_half_the_passages(
    tiny_models: ModelConfig, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    n_passages = request.config.getoption("--passages", 0)
    if not n_passages:
        pytest.skip("takes minutes: name a number with --passages")
    n_questions = request.config.getoption("--questions")
    found = measure(tmp_path, tiny_models, tmp_path / "cache", n_passages=n_passages, n_questions=n_questions)
    print(found)
    assert found.found_before == 2 * found.purged
    assert (found.leaked_texts, found.leaked_tensors, found.different_logits) == (0, 0, 0)
