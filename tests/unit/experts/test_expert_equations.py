"""Eq. 2 and 6 against literal loops over tokens and experts in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from knowstore.errors import ExpertShapeError
from knowstore.experts import (
    Expert,
    Experts,
    Factors,
    combine,
    expert_output,
    heaviest,
    segment_weights,
    word_weights,
)

D, T = 6, 4
CPU = torch.device("cpu")
Item = tuple[Expert, float, Sequence[float] | None]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def neurons(*segment_ranks: int) -> Expert:
    rank = sum(segment_ranks)
    return Expert("neurons", {"up": torch.randn(D, rank), "down": torch.randn(rank, D)}, segment_ranks)


def factors(rank: int) -> Expert:
    shapes = {"up1": (D, rank), "up2": (rank, D), "dw1": (D, rank), "dw2": (rank, D)}
    return Expert("factors", {name: torch.randn(shape) for name, shape in shapes.items()}, (rank,))


def literal_product(row: list[float], matrix: list[list[float]]) -> list[float]:
    return [
        sum(value * line[column] for value, line in zip(row, matrix, strict=True)) for column in range(len(matrix[0]))
    ]


def literal_eq2(x: list[float], up1: Tensor, up2: Tensor, dw1: Tensor, dw2: Tensor) -> list[float]:
    """ReLU(x W_up1 W_up2) W_dw1 W_dw2 for the state of one token."""
    inner = literal_product(literal_product(x, up1.tolist()), up2.tolist())
    hidden = [max(0.0, value) for value in inner]
    return literal_product(literal_product(hidden, dw1.tolist()), dw2.tolist())


def literal_expert(expert: Expert, x: list[float], weight: float, neurons: Sequence[float] | None) -> list[float]:
    """r E(x), or the sum of its neurons, each by its own weight."""
    if expert.form == "factors":
        return [weight * value for value in literal_eq2(x, *(expert.tensors[n] for n in ("up1", "up2", "dw1", "dw2")))]
    up, down = expert.tensors["up"].tolist(), expert.tensors["down"].tolist()
    out = [0.0] * D
    for neuron, share in enumerate([weight] * expert.rank if neurons is None else neurons):
        fires = max(0.0, sum(x[i] * up[i][neuron] for i in range(D)))
        out = [value + share * fires * down[neuron][i] for i, value in enumerate(out)]
    return out


def literal_eq6(
    x: Tensor, questions: Sequence[Sequence[Item]], static: Factors | None, max_norm: float | None
) -> Tensor:
    """The sum over experts of r_k E_k(x_t), bounded, and the static expert, token by token."""
    out = torch.zeros_like(x)
    for b, question in enumerate(questions):
        for t in range(x.shape[1]):
            state = x[b, t].tolist()
            total = [0.0] * D
            for item in question:
                total = [a + b for a, b in zip(total, literal_expert(item[0], state, *item[1:]), strict=True)]
            norm = math.sqrt(sum(value * value for value in total))
            if max_norm is not None and norm > max_norm:
                total = [value * max_norm / norm for value in total]
            if static is not None and question:
                added = literal_eq2(state, static.up1, static.up2, static.dw1, static.dw2)
                total = [a + b for a, b in zip(total, added, strict=True)]
            out[b, t] = torch.tensor(total, dtype=x.dtype)
    return out


ONE_EXPERT: list[list[Item]] = [[(neurons(3), 1.0, None)]]
# weights that float32 holds exactly
CASES: dict[str, tuple[list[list[Item]], bool, float | None]] = {
    "one neurons expert": (ONE_EXPERT, False, None),
    "one factors expert": ([[(factors(2), 1.0, None)]], False, None),
    "several neurons experts of different ranks": (
        [[(neurons(3), 0.75, None), (neurons(5), 0.25, None)], [(neurons(1), 1.0, None)]],
        False,
        None,
    ),
    "several factors experts, not as many for each question": (
        [[(factors(2), 0.75, None), (factors(2), 0.25, None)], [(factors(2), 1.0, None)]],
        False,
        None,
    ),
    "a weight for each neuron": (
        [
            [(neurons(1, 0, 2), 1.0, (0.5, 0.25, 0.125)), (neurons(1, 1), 0.25, None)],
            [(neurons(2), 1.0, (0.375, 0.0))],
        ],
        False,
        None,
    ),
    "the static expert": ([[(neurons(3), 0.625, None), (neurons(3), 0.375, None)]], True, None),
    "the static expert beside factors": ([[(factors(3), 1.0, None)]], True, None),
    "a bound on the norm": ([[(neurons(3), 0.625, None), (neurons(2), 0.375, None)]], True, 0.5),
    "a bound on the norm that nothing reaches": ([[(factors(3), 1.0, None)]], True, 1e6),
    "questions without experts": ([[], [(neurons(3), 1.0, None)], []], True, 0.5),
    "no expert at all": ([[], []], True, None),
    "an expert of rank 0": (
        [[(neurons(0), 1.0, None)], [(neurons(0, 0), 0.5, None), (neurons(2), 0.5, None)]],
        False,
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_output_is_the_literal_sum_of_equation_6(name: str) -> None:
    questions, has_static, max_norm = CASES[name]
    static = factors(2).factors().to(CPU, torch.float64) if has_static else None
    x = torch.randn(len(questions), T, D, dtype=torch.float64)
    mounted = combine(questions, device=CPU, dtype=torch.float64, static=static, max_norm=max_norm)
    expected = literal_eq6(x, questions, static, max_norm)
    tolerance = 1e-10 if max_norm is None else 1e-6  # norms are taken in float32
    torch.testing.assert_close(expert_output(mounted, x), expected, rtol=tolerance, atol=tolerance)
    if name == "no expert at all":
        assert not expert_output(mounted, x).any()


def test_segments_weigh_their_neurons() -> None:
    assert segment_weights((2, 0, 3), (0.5, 0.25, 0.125)) == [0.5, 0.5, 0.125, 0.125, 0.125]
    with pytest.raises(ExpertShapeError, match="2 segment weights for an expert of 3 segments"):
        segment_weights((2, 0, 3), (0.5, 0.25))


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        ([[1.0, 1.0], [1.0]], [[0, 1], [0]]),
        ([[0.0, 1.0, 0.0], [0.5, 0.0]], [[1], [0]]),
        ([[1e-7, 0.7, 5e-4], [1e-5, 0.3]], [[1], [1]]),
        ([[0.7, 2e-3], [0.3, 1e-5]], [[0, 1], [0]]),
        ([[1e-9, 1e-8], [1.0]], [[], [0]]),
        ([[0.5] * 1500, [0.5]], [[*range(1500)], [0]]),
        ([[1.0] * 1500, [0.02, 1e-3]], [[*range(1500)], [0]]),
        ([None, [0.5, 0.0], None], [None, [0], None]),
        ([[0.0, 0.0]], [[0, 1]]),
        ([None], [None]),
        ([[]], [[]]),
        ([], []),
    ],
)
def test_neurons_that_weigh_next_to_nothing_together_are_not_mounted(
    weights: list[list[float] | None], kept: list[list[int] | None]
) -> None:
    assert heaviest(weights) == kept


def test_a_part_of_an_expert_is_its_neurons_alone() -> None:
    expert = neurons(2, 3)
    part = expert.part([4, 0])
    weights = [0.5, 0.0, 0.0, 0.0, 2.0]
    x = torch.randn(1, T, D)
    whole, some = (
        expert_output(combine([[(one, 1.0, given)]], device=CPU, dtype=torch.float32), x)
        for one, given in ((expert, weights), (part, [2.0, 0.5]))
    )
    torch.testing.assert_close(some, whole)
    assert part.segment_ranks == (2,)
    assert expert.part([]).rank == 0


def test_words_weigh_the_neurons_that_share_characters_with_them() -> None:
    words = [(-4, -1, 1.0), (0, 4, 0.25), (4, 6, 0.5), (7, 9, 0.125), (40, 44, 1.0)]
    assert word_weights([(0, 2), (2, 5), (5, 7), (6, 7), (7, 9)], words) == [0.25, 0.5, 0.5, 0.0, 0.125]
    assert word_weights([], words) == []


def test_a_question_without_experts_gets_exactly_nothing() -> None:
    mounted = combine(
        CASES["questions without experts"][0], device=CPU, dtype=torch.float32, static=factors(2).factors()
    )
    out = expert_output(mounted, torch.randn(3, T, D))
    assert not out[0].any()
    assert not out[2].any()
    assert out[1].any()


def test_neurons_as_four_matrices_give_equation_2() -> None:
    expert = neurons(2, 3)
    four = expert.factors().to(CPU, torch.float64)
    x = torch.randn(T, D, dtype=torch.float64)
    expected = [literal_eq2(row, four.up1, four.up2, four.dw1, four.dw2) for row in x.tolist()]
    as_neurons = [literal_expert(expert, row, 1.0, None) for row in x.tolist()]
    torch.testing.assert_close(four.output(x), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(torch.tensor(as_neurons), torch.tensor(expected))
    assert (four.up1.shape, four.up2.shape, four.dw1.shape, four.dw2.shape) == ((D, 5), (5, D), (D, 5), (5, D))


def test_more_neurons_than_the_inner_width_are_no_four_matrices() -> None:
    with pytest.raises(ExpertShapeError, match="7 neurons do not fit the inner width 6"):
        neurons(7).factors()


def test_repeated_experts_serve_the_copies_of_each_question_in_order() -> None:
    questions = CASES["a weight for each neuron"][0]
    mounted = combine(questions, device=CPU, dtype=torch.float64, static=factors(2).factors())
    x = torch.randn(2, T, D, dtype=torch.float64)
    out = expert_output(mounted.repeat(3), x.repeat_interleave(3, 0))
    torch.testing.assert_close(out, expert_output(mounted, x).repeat_interleave(3, 0))
    assert mounted.repeat(1) is mounted


def test_static_alone_serves_any_number_of_questions() -> None:
    static = factors(2).factors()
    x = torch.randn(5, T, D)
    torch.testing.assert_close(expert_output(Experts(static=static), x), static.output(x))


def test_gradients_reach_the_experts() -> None:
    expert = neurons(3)
    up = expert.tensors["up"][None].requires_grad_()
    experts = Experts(up=up, down=expert.tensors["down"][None], neuron_weights=torch.ones(1, 3), max_norm=1.0)
    expert_output(experts, torch.randn(1, T, D)).sum().backward()
    assert up.grad is not None
    assert up.grad.any()


@pytest.mark.parametrize(
    ("form", "tensors", "segment_ranks"),
    [
        ("neurons", {"up": torch.zeros(6, 2)}, (2,)),
        ("neurons", {"up": torch.zeros(6, 2), "dw2": torch.zeros(2, 6)}, (2,)),
        ("neurons", {"up": torch.zeros(6, 2), "down": torch.zeros(6, 2)}, (2,)),
        ("neurons", {"up": torch.zeros(12), "down": torch.zeros(2, 6)}, (2,)),
        ("neurons", {"up": torch.zeros(6, 2), "down": torch.zeros(2, 6)}, (1,)),
        ("neurons", {"up": torch.zeros(6, 2), "down": torch.zeros(2, 6)}, (3, -1)),
        ("neurons", {"up": torch.zeros(6, 2), "down": torch.zeros(2, 6)}, ()),
        ("factors", {"up": torch.zeros(6, 2), "down": torch.zeros(2, 6)}, (2,)),
        ("factors", {n: torch.zeros(6, 2) for n in ("up1", "up2", "dw1", "dw2")}, (2,)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    form: str, tensors: dict[str, Tensor], segment_ranks: tuple[int, ...]
) -> None:
    with pytest.raises(ExpertShapeError):
        Expert(form, tensors, segment_ranks)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "question",
    [
        [(neurons(2), 1.0, None), (factors(2), 1.0, None)],
        [(factors(2), 1.0, None), (factors(3), 1.0, None)],
        [(neurons(2), 1.0, (0.5,))],
        [(factors(2), 1.0, (0.5, 0.5))],
        [
            (neurons(2), 1.0, None),
            (Expert("neurons", {"up": torch.zeros(3, 1), "down": torch.zeros(1, 3)}, (1,)), 1.0, None),
        ],
    ],
)
def test_experts_that_do_not_go_together_are_refused(question: list[Item]) -> None:
    with pytest.raises(ExpertShapeError):
        combine([question], device=CPU, dtype=torch.float32)
