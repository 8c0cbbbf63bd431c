"""MEMIT: its closed form against a direct solve, its statistics against their definition, and what it teaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from knowstore.baselines import Edit, TaughtFact
from knowstore.baselines.memit import Memit, MemitSettings, outputs_at_subjects, update_factor
from knowstore.baselines.sequences import essence_row, fact_sequence, logits_of, writing_loss
from knowstore.baselines.statistics import CorpusSample, key_moments
from knowstore.baselines.weights import down_projection
from knowstore.experts import FrozenLLM

SETTINGS = MemitSettings(layers=(0, 1), steps=30, learning_rate=0.3, n_contexts=1, weight_of_usual=1e-3)


def test_the_closed_form_is_the_solution_of_the_regularised_least_squares_problem() -> None:
    """min over X of weight tr(X C X^T) + |X K - R|^2, as ordinary least squares on stacked rows."""
    generator = torch.Generator().manual_seed(0)
    K = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    R = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    usual = torch.randn(7, 20, generator=generator, dtype=torch.float64)
    C, weight = usual @ usual.T / 20, 0.7
    root = torch.linalg.cholesky(weight * C)  # weight C = root root^T
    stacked, wanted = torch.cat([K.T, root.T]), torch.cat([R.T, torch.zeros(7, 5, dtype=torch.float64)])
    direct = torch.linalg.lstsq(stacked, wanted).solution.T
    torch.testing.assert_close(R @ update_factor(K, C, weight), direct)


def test_key_moments_are_the_mean_outer_product_of_the_keys(tiny_llm: FrozenLLM, usual_texts: Sequence[str]) -> None:
    found = key_moments(tiny_llm, (1, 2), CorpusSample(usual_texts))
    keys = []
    for text in usual_texts:
        ids = torch.tensor([tiny_llm.prompt_ids(text)])
        with torch.no_grad():
            mlp = tiny_llm.model.model.layers[1].mlp
            x = tiny_llm.states(ids, 1)[0]
            keys.append(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    all_keys = torch.cat(keys)
    torch.testing.assert_close(found[1], all_keys.T @ all_keys / len(all_keys))
    assert set(found) == {1, 2}


def test_statistics_are_read_from_the_cache_and_made_again_when_damaged(
    tiny_llm: FrozenLLM, usual_texts: Sequence[str], tmp_path: Path
) -> None:
    sample = CorpusSample(usual_texts, cache_dir=tmp_path, fingerprint="tiny")
    first = key_moments(tiny_llm, (0,), sample)[0]
    [file] = (tmp_path / "statistics").iterdir()
    reports: list[str] = []
    again = key_moments(tiny_llm, (0,), sample, lambda stage, _done, _total: reports.append(stage))[0]
    assert torch.equal(first, again)
    assert reports == []
    file.write_bytes(b"half a file")
    assert torch.equal(first, key_moments(tiny_llm, (0,), sample)[0])
    key_moments(tiny_llm, (0,), replace(sample, fingerprint="another"))
    assert len(list((tmp_path / "statistics").iterdir())) == 2


def test_the_subject_is_found_at_its_last_token(tiny_llm: FrozenLLM) -> None:
    fact = TaughtFact("Where does the river Rhône end?", "Rhône", "in the sea")
    row = fact_sequence(tiny_llm, fact, before="Rome.\n")
    until = tiny_llm.tokenizer.decode(row.ids[: row.subject + 1])
    assert until == "Rome.\nQuestion: Where does the river Rhône"
    nowhere = fact_sequence(tiny_llm, replace(fact, subject="Tiber"))
    assert nowhere.subject == nowhere.n_given - 1


def test_logits_are_those_of_the_steps_to_be_written(tiny_llm: FrozenLLM, edits: Sequence[Edit]) -> None:
    rows = [fact_sequence(tiny_llm, edit.facts[0]) for edit in edits]
    logits, right = logits_of(tiny_llm, rows)
    with torch.no_grad():
        alone = [
            tiny_llm.model(input_ids=torch.tensor([row.ids])).logits[0, row.n_given - 1 : -1].float() for row in rows
        ]
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert right.tolist() == [token for row in rows for token in row.ids[row.n_given :]]


def test_an_edit_moves_the_top_layer_to_where_the_target_is_written(
    tiny_llm: FrozenLLM, edits: Sequence[Edit], usual_texts: Sequence[str]
) -> None:
    memit = Memit(CorpusSample(usual_texts * 3), SETTINGS)
    memit.prepare(tiny_llm)
    row = fact_sequence(tiny_llm, edits[0].facts[0])
    before, loss = outputs_at_subjects(tiny_llm, [row], 1), float(writing_loss(tiny_llm, [row]).detach())
    wanted = memit._wanted(tiny_llm, [[row]], [essence_row(tiny_llm, edits[0].facts[0])])
    with memit.teaching(tiny_llm) as teach:
        edited = teach(edits[:1])
        left = (wanted - outputs_at_subjects(tiny_llm, [row], 1)).norm() / (wanted - before).norm()
        assert float(left) < 0.2
        assert float(writing_loss(tiny_llm, [row]).detach()) < loss - 0.5
    d = down_projection(tiny_llm.model, 0).in_features
    assert edited.kept_bytes == 4 * 2 * (tiny_llm.width + d)
    assert edited.seconds > 0


@pytest.mark.parametrize("layer", [0, 2])
def test_the_last_linear_map_of_an_ffn_is_found(tiny_llm: FrozenLLM, layer: int) -> None:
    assert down_projection(tiny_llm.model, layer) is tiny_llm.model.model.layers[layer].mlp.down_proj
