"""MEND and MALMEN: gradients in factors against autograd, the normal equation against least squares, and training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from knowstore.baselines import Edit, EditProbe, EditRow
from knowstore.baselines.editor import EditorShape, GradientEditor
from knowstore.baselines.gradients import GradientFactors, changed_by, gradient_factors
from knowstore.baselines.malmen import least_squares, normal_equation
from knowstore.baselines.mend import summed
from knowstore.baselines.sequences import fact_sequence, writing_loss
from knowstore.baselines.trained import EditorData, EditorSettings, TrainedEditor
from knowstore.baselines.weights import down_projection
from knowstore.errors import ConfigError
from knowstore.experts import FrozenLLM

SETTINGS = EditorSettings(n_layers=2, rank=4, steps=30, learning_rate=0.03, n_standard=2)
RULES = {"mend": summed, "malmen": least_squares}


@pytest.fixture(scope="session")
def rows(edits: tuple[Edit, Edit]) -> tuple[EditRow, ...]:
    return tuple(
        EditRow(
            str(number),
            (edit,),
            (
                EditProbe("efficacy", edit.facts[0].question, (edit.facts[0].target,)),
                EditProbe("paraphrase", f"Say: {edit.facts[0].question}", (edit.facts[0].target,)),
                EditProbe("neighbourhood", "Who was the first king of Rome?", ("Romulus",)),
            ),
        )
        for number, edit in enumerate(edits)
    )


def test_gradient_factors_multiply_to_the_gradient_of_autograd(tiny_llm: FrozenLLM, edits: Sequence[Edit]) -> None:
    maps = [down_projection(tiny_llm.model, layer) for layer in (2, 1)]
    facts = [fact_sequence(tiny_llm, edit.facts[0]) for edit in edits]
    found = gradient_factors(tiny_llm, facts, maps)
    weights = [one.weight for one in maps]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        direct = torch.autograd.grad(writing_loss(tiny_llm, facts), weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    for one, gradient in zip(found, direct, strict=True):
        torch.testing.assert_close(one.delta.T @ one.u, gradient, atol=1e-5, rtol=1e-4)
        assert len(one.u) == len(one.delta) <= sum(len(fact.ids) - 1 for fact in facts)


def test_an_untrained_mend_follows_the_gradient_downhill(tiny_llm: FrozenLLM, edits: Sequence[Edit]) -> None:
    maps = [down_projection(tiny_llm.model, layer) for layer in (2, 1)]
    facts = [fact_sequence(tiny_llm, edits[0].facts[0])]
    found = gradient_factors(tiny_llm, facts, maps)
    editor = GradientEditor(EditorShape(2, maps[0].in_features, maps[0].out_features), rate=0.5)
    changes = [change.detach() for change in editor.changes(found, summed)]
    for one, change in zip(found, changes, strict=True):
        torch.testing.assert_close(change, -0.5 * one.delta.T @ one.u / len(one.u))
    before = float(writing_loss(tiny_llm, facts).detach())
    with changed_by(maps, changes):
        assert float(writing_loss(tiny_llm, facts).detach()) < before


def test_the_network_is_the_papers_equation() -> None:
    """Section 3.1 of Mitchell et al. (2022), token by token."""
    torch.manual_seed(0)
    editor = GradientEditor(EditorShape(2, 3, 2, rank=4))
    for parameter in editor.parameters():
        nn.init.normal_(parameter)
    editor.mean.normal_()
    found = GradientFactors(torch.randn(6, 3), torch.randn(6, 2))
    edited = editor.transform(1, found)
    for t in range(6):
        z = (torch.cat([found.u[t], found.delta[t]]) - editor.mean[1]) / editor.scale[1]
        for block in range(2):
            low = editor.up[block].T @ (editor.down[block].T @ z) + editor.bias[block]
            z = z + torch.relu(editor.scales[1, block] * low + editor.offsets[1, block])
        torch.testing.assert_close(torch.cat([edited.u[t], edited.delta[t]]), z)


def test_another_training_set_is_not_given_the_network_of_the_first(
    tiny_llm: FrozenLLM, rows: Sequence[EditRow], tmp_path: Path
) -> None:
    nameless = [replace(row, row_id="") for row in rows]
    others = [replace(row, probes=row.probes[:2]) for row in nameless]
    editors = [
        TrainedEditor("mend", summed, EditorData(some, tmp_path, "tiny"), replace(SETTINGS, steps=2))
        for some in (nameless, others, nameless)
    ]
    for editor in editors:
        editor.prepare(tiny_llm)
    assert [len(editor.losses) for editor in editors] == [2, 2, 0]


def test_a_change_beside_a_map_is_a_change_of_its_weights(tiny_llm: FrozenLLM, edits: Sequence[Edit]) -> None:
    one, facts = down_projection(tiny_llm.model, 1), [fact_sequence(tiny_llm, edits[0].facts[0])]
    change = torch.randn(one.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    with changed_by([one], [change]):
        beside = writing_loss(tiny_llm, facts)
    weight = one.weight.detach().clone()
    with torch.no_grad():
        one.weight += change
        within = writing_loss(tiny_llm, facts)
        one.weight.copy_(weight)
    torch.testing.assert_close(beside, within)


@pytest.mark.parametrize("n_tokens", [3, 7, 20])
def test_the_normal_equation_is_the_solution_of_damped_least_squares(n_tokens: int) -> None:
    """min over S of |S U - D|^2 + damping |S|^2, as ordinary least squares on stacked rows; T below, at and over d."""
    generator = torch.Generator().manual_seed(n_tokens)
    U = torch.randn(7, n_tokens, generator=generator, dtype=torch.float64)
    D = torch.randn(5, n_tokens, generator=generator, dtype=torch.float64)
    damping = torch.tensor(0.3, dtype=torch.float64)
    stacked = torch.cat([U.T, damping.sqrt() * torch.eye(7, dtype=torch.float64)])
    direct = torch.linalg.lstsq(stacked, torch.cat([D.T, torch.zeros(7, 5, dtype=torch.float64)])).solution.T
    torch.testing.assert_close(normal_equation(U, D, damping), direct)


def test_malmen_gives_a_lone_token_what_it_wants_when_nothing_is_damped() -> None:
    generator = torch.Generator().manual_seed(0)
    u, delta, wanted_u, wanted_delta = (torch.randn(1, n, generator=generator) for n in (7, 5, 7, 5))
    found, edited = GradientFactors(u, delta), GradientFactors(wanted_u, wanted_delta)
    change = least_squares(found, edited, torch.tensor(0.5), torch.tensor(1e-9))
    alone = -0.5 * wanted_delta.T @ wanted_u  # (D, d)
    torch.testing.assert_close(change @ u[0], alone @ u[0])


@pytest.mark.parametrize("name", RULES)
def test_training_lowers_the_loss_and_the_trained_network_edits(
    tiny_llm: FrozenLLM, rows: Sequence[EditRow], tmp_path: Path, name: str
) -> None:
    editor = TrainedEditor(name, RULES[name], EditorData(rows, tmp_path, "tiny"), SETTINGS)
    editor.prepare(tiny_llm)
    assert sum(editor.losses[-5:]) < 0.9 * sum(editor.losses[:5])
    row = fact_sequence(tiny_llm, rows[0].edits[0].facts[0])
    before = float(writing_loss(tiny_llm, [row]).detach())
    bits = {key: tensor.clone() for key, tensor in tiny_llm.model.state_dict().items()}
    with editor.teaching(tiny_llm) as teach:
        edited = teach(rows[0].edits)
        after = float(writing_loss(tiny_llm, [row]).detach())
        assert after < before - 0.2
    assert all(torch.equal(bits[key], tensor) for key, tensor in tiny_llm.model.state_dict().items())
    assert edited.kept_bytes > 0

    again = TrainedEditor(name, RULES[name], EditorData(rows, tmp_path, "tiny"), SETTINGS)
    again.prepare(tiny_llm)
    assert again.losses == []
    with again.teaching(tiny_llm) as teach:
        teach(rows[0].edits)
        assert float(writing_loss(tiny_llm, [row]).detach()) == after


def test_an_editor_without_edits_to_train_on_says_what_to_give(tiny_llm: FrozenLLM) -> None:
    with pytest.raises(ConfigError, match="mend needs edits to train its network on"):
        TrainedEditor("mend", summed, EditorData(())).prepare(tiny_llm)
