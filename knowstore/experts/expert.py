"""Experts: the tensors of Eq. 2, and K of them combined for a batch of questions (Eq. 6).

Symbols: B questions, T tokens, D LLM width, R rank, K experts. Two forms of one equation:

    factors   E(x) = ReLU(x up1 up2) dw1 dw2    up1 (D, R), up2 (R, D), dw1 (D, R), dw2 (R, D): Eq. 2 as it stands
    neurons   E(x) = ReLU(x up) down            up (D, R), down (R, D): Eq. 2 with up2 and dw1 selecting the rank,
                                                so that the ReLU acts on R neurons instead of D
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from knowstore.errors import ExpertShapeError
from knowstore.experts.quantised import MOST_ROWS, EightBits

Form = Literal["neurons", "factors"]
_LEAST = 1e-3  # of the weight of a question's neurons; of eight passages it is nine tenths of the neurons
_SLIGHT = 1e-2
_BY_FAR = 4.0  # times as much as any other
_NAMES: dict[Form, tuple[str, ...]] = {"neurons": ("up", "down"), "factors": ("up1", "up2", "dw1", "dw2")}


def _shape_error(what: str) -> ExpertShapeError:
    return ExpertShapeError(what, kept="nothing was mounted", fix="use experts that one hypernetwork generated")


@dataclass(frozen=True)
class Factors:
    """The four matrices of Eq. 2: `up1` (D, R), `up2` (R, D), `dw1` (D, R), `dw2` (R, D)."""

    up1: Tensor
    up2: Tensor
    dw1: Tensor
    dw2: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Factors:
        """The same matrices elsewhere or in another precision."""
        return Factors(*(part.to(device, dtype) for part in (self.up1, self.up2, self.dw1, self.dw2)))

    def output(self, x: Tensor) -> Tensor:
        """Eq. 2 for `x` (..., D)."""
        hidden: Tensor = relu(x.to(self.up1.dtype) @ self.up1 @ self.up2)  # (..., D)
        return hidden @ self.dw1 @ self.dw2


@dataclass(frozen=True)
class QueryExperts:
    """Experts in the form `neurons` beside the FFNs of some blocks, which no passage owns: of each of the 0-based
    `layers` the `up` (D, R) and `down` (R, D), and `rounded` their transposes in eight bits, for single tokens of
    a model in bfloat16; none where that is not wanted."""

    layers: tuple[int, ...]
    up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]
    rounded: tuple[tuple[EightBits, EightBits], ...] = ()

    def to(self, device: torch.device, dtype: torch.dtype) -> QueryExperts:
        """The same experts elsewhere or in another precision."""
        up, down = (tuple(part.to(device, dtype) for part in parts) for parts in (self.up, self.down))
        return replace(self, up=up, down=down)

    def with_rounded(self) -> QueryExperts:
        """The same experts with their weights in eight bits beside them, where there are products with such."""
        pairs = [(EightBits.of(up.T), EightBits.of(down.T)) for up, down in zip(self.up, self.down, strict=True)]
        rounded = tuple((up, down) for up, down in pairs if up is not None and down is not None)
        return replace(self, rounded=rounded if len(rounded) == len(pairs) else ())


@dataclass(frozen=True)
class Expert:
    """The expert of one passage.

    Args:
        form: `neurons` with tensors `up` (D, R) and `down` (R, D), or `factors` with `up1` (D, R),
            `up2` (R, D), `dw1` (D, R), `dw2` (R, D).
        tensors: by the names above.
        segment_ranks: how many of the R neurons belong to each segment (sentence) of the passage, in
            order; they sum to R. One entry when the expert has no segments.

    Raises:
        ExpertShapeError: names or shapes that do not fit together.
    """

    form: Form
    tensors: dict[str, Tensor]
    segment_ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        names = _NAMES[self.form]
        if tuple(sorted(self.tensors)) != tuple(sorted(names)):
            raise _shape_error(f"an expert of form {self.form} has tensors {sorted(self.tensors)}, expected {names}")
        first = self.tensors[names[0]]
        if first.dim() != 2:
            raise _shape_error(f"expert tensor {names[0]} has shape {tuple(first.shape)}, expected (D, R)")
        width, rank = self.width, self.rank
        for position, name in enumerate(names):
            expected = (width, rank) if position % 2 == 0 else (rank, width)
            found = tuple(self.tensors[name].shape)
            if found != expected:
                raise _shape_error(f"expert tensor {name} has shape {found}, expected {expected}")
        if sum(self.segment_ranks) != rank or min(self.segment_ranks, default=0) < 0:
            raise _shape_error(f"segments of ranks {self.segment_ranks} do not add up to rank {rank}")

    @property
    def width(self) -> int:
        return int(self.tensors[_NAMES[self.form][0]].shape[0])

    @property
    def rank(self) -> int:
        return int(self.tensors[_NAMES[self.form][0]].shape[1])

    def part(self, neurons: Sequence[int]) -> Expert:
        """Some of its neurons, in that order, as one segment; for the form `neurons`."""
        up, down = self.tensors["up"], self.tensors["down"]
        chosen = torch.tensor(neurons, dtype=torch.long)
        return Expert("neurons", {"up": up[:, chosen], "down": down[chosen]}, (len(neurons),))

    def factors(self) -> Factors:
        """The expert as the four matrices of Eq. 2, whatever its form.

        Raises:
            ExpertShapeError: an expert of more neurons than the inner width D of Eq. 2.
        """
        if self.form == "factors":
            return Factors(*(self.tensors[name] for name in _NAMES["factors"]))
        up, down = self.tensors["up"], self.tensors["down"]
        if self.rank > self.width:
            raise _shape_error(f"{self.rank} neurons do not fit the inner width {self.width} of Eq. 2")
        select = torch.eye(self.rank, self.width, dtype=up.dtype, device=up.device)  # (R, D)
        return Factors(up, select, select.T.contiguous(), down)


class Amplitude:
    """The largest norm of what experts would have added at a position without their bound."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None

    def see(self, norm: Tensor) -> None:
        """Note the norms of some positions, without waiting for their device."""
        seen = norm.detach().nan_to_num(nan=float("inf")).amax()
        self._largest = seen if self._largest is None else torch.maximum(self._largest, seen)

    @property
    def largest(self) -> float:
        return 0.0 if self._largest is None else float(self._largest)


class Turns:
    """Which neurons of B questions have had their turn while texts are written token by token.

    A neuron stands for one word in one place of a passage, and fires where the word before it was written. What the
    passage has twice, such as the dots of `F.C.`, would bring it back at each of them, round and round. So the neuron
    that fired by far most before a token and not at all behind it, as one whose word was written, fires no more.

    Attributes:
        left: (B, N), 0 for neurons that had their turn and 1 for all others.
    """

    def __init__(self, neuron_weights: Tensor) -> None:
        self.left = torch.ones_like(neuron_weights)
        self._last: tuple[Tensor, Tensor] | None = None

    def see(self, fired: Tensor) -> None:
        """How the neurons fire, (B, N), where the next token is to be written."""
        if self._last is not None:
            neuron, was_on = self._last
            is_over = was_on & (fired.gather(1, neuron) <= 0)
            self.left = self.left.scatter(1, neuron, self.left.gather(1, neuron).masked_fill(is_over, 0))
        if not fired.shape[1]:
            return
        most = fired.topk(min(2, fired.shape[1]))
        first, second = most.values[:, :1], most.values[:, 1:].sum(1, keepdim=True)  # 0 where there is no second
        self._last = most.indices[:, :1], (first > 0) & (first >= _BY_FAR * second)


@dataclass(frozen=True)
class Experts:
    """What is mounted for B questions: sum_k r_k E_k(x) plus the static expert, which no passage owns.

    Args:
        up, down: neurons of all experts of a question side by side, (B, D, N) and (B, N, D), padded with
            zeros; None where the experts are factors.
        neuron_weights: (B, N), the relevance r_k of the expert that a neuron belongs to.
        factors: `up1` (B, K, D, R), `up2` (B, K, R, D), `dw1` (B, K, D, R), `dw2` (B, K, R, D).
        factor_weights: (B, K).
        static: trained once with the hypernetwork: how to answer, and no knowledge. Added as it is.
        query: experts below the mount layer, trained with the hypernetwork as well, and no knowledge either.
        is_on: (B, 1, 1), 0 where the null option won: nothing is added for that question.
        max_norm: bound on the norm of what all passages' experts add at a position; None adds Eq. 6 as it is.
        amplitude: where the largest norm before that bound is noted.
    """

    up: Tensor | None = None
    down: Tensor | None = None
    neuron_weights: Tensor | None = None
    factors: Factors | None = None
    factor_weights: Tensor | None = None
    static: Factors | None = None
    query: QueryExperts | None = None
    is_on: Tensor | None = None
    max_norm: float | None = None
    amplitude: Amplitude | None = None

    @property
    def n_questions(self) -> int:
        """B, or 0 when only the static expert is mounted, which serves any number."""
        first = self.up if self.up is not None else self.factor_weights if self.factors is not None else self.is_on
        return 0 if first is None else int(first.shape[0])

    @property
    def width(self) -> int:
        """D, or 0 when there is nothing to mount."""
        if self.up is not None:
            return int(self.up.shape[1])
        some = self.factors.dw2 if self.factors is not None else self.static.dw2 if self.static is not None else None
        return 0 if some is None else int(some.shape[-1])

    def repeat(self, n: int) -> Experts:
        """The same experts for every question's `n` beams or samples, in the order of `generate`."""
        if n == 1:
            return self

        def each(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.repeat_interleave(n, 0)

        factors = self.factors
        if factors is not None:
            parts = (factors.up1, factors.up2, factors.dw1, factors.dw2)
            factors = Factors(*(part.repeat_interleave(n, 0) for part in parts))
        return Experts(
            up=each(self.up),
            down=each(self.down),
            neuron_weights=each(self.neuron_weights),
            factors=factors,
            factor_weights=each(self.factor_weights),
            static=self.static,
            query=self.query,
            is_on=each(self.is_on),
            max_norm=self.max_norm,
            amplitude=self.amplitude,
        )


def expert_output(experts: Experts, x: Tensor, turns: Turns | None = None) -> Tensor:
    """The sum of Eq. 6 over all mounted experts as fused products; `x` and the result are (B, T, D). Neurons that had
    their turn, where `turns` are kept, add nothing, and it sees how the others fire at the last of the T positions."""
    total = None
    if experts.up is not None and experts.down is not None and experts.neuron_weights is not None:
        weights = experts.neuron_weights if turns is None else experts.neuron_weights * turns.left
        hidden: Tensor = relu(x @ experts.up) * weights[:, None]  # (B, T, N)
        total = hidden @ experts.down
        if turns is not None:
            turns.see(hidden[:, -1])
    if experts.factors is not None and experts.factor_weights is not None:
        four = experts.factors
        low = torch.einsum("btd,bkdr->bktr", x, four.up1)
        inner = relu(low @ four.up2) @ four.dw1 * experts.factor_weights[:, :, None, None]  # (B, K, T, R)
        summed = torch.einsum("bktr,bkrd->btd", inner, four.dw2)
        total = summed if total is None else total + summed
    if total is not None and experts.max_norm is not None:
        norm = total.float().norm(dim=-1, keepdim=True)
        if experts.amplitude is not None:
            experts.amplitude.see(norm)
        scale = (experts.max_norm / norm.clamp(min=experts.max_norm)).to(total.dtype)
        total = torch.where(norm.isfinite(), total * scale, 0.0)  # an expert out of all proportion adds nothing
    if experts.static is not None:
        static = experts.static.output(x)
        total = static if total is None else total + static
    if total is None:
        return torch.zeros_like(x)
    return total if experts.is_on is None else total * experts.is_on


def query_output(index: int, experts: Experts, x: Tensor) -> Tensor:
    """What the query experts' `index`-th adds for the input x (B, T, D) of its block's FFN."""
    if experts.query is None:
        return torch.zeros_like(x)
    query = experts.query
    is_small = x.dtype == torch.bfloat16 and x.numel() <= MOST_ROWS * x.shape[-1]
    if query.rounded and is_small and not torch.is_grad_enabled():
        first, last = query.rounded[index]
        out = last.product(relu(first.product(x)))
    else:
        up, down = query.up[index], query.down[index]
        out = relu(x.to(up.dtype) @ up) @ down
    return out if experts.is_on is None else out * experts.is_on


Mountable = tuple[Expert, float, Sequence[float] | None]
"""An expert, its relevance r_k, and the weights of its R neurons, or None to give each r_k."""


def segment_weights(segment_ranks: Sequence[int], weights: Sequence[float]) -> list[float]:
    """The weights of an expert's neurons, each that of its segment.

    Raises:
        ExpertShapeError: another number of weights than segments.
    """
    if len(weights) != len(segment_ranks):
        raise _shape_error(f"{len(weights)} segment weights for an expert of {len(segment_ranks)} segments")
    return [weight for weight, rank in zip(weights, segment_ranks, strict=True) for _ in range(rank)]


def word_weights(spans: Sequence[tuple[int, int]], words: Sequence[tuple[int, int, float]]) -> list[float]:
    """The weights of neurons that stand for the characters `spans`: the largest weight of a word piece among them.

    Args:
        spans: (first character, last character) in the passage's text, of each neuron.
        words: (first character, last character, weight) of word pieces; characters of none weigh 0.
    """
    characters = [0.0] * max((last for _, last in spans), default=0)
    for first, last, weight in words:
        for place in range(max(first, 0), min(last, len(characters))):
            characters[place] = max(characters[place], weight)
    return [max(characters[first:last], default=0.0) for first, last in spans]


def heaviest(experts: Sequence[Sequence[float] | None]) -> list[list[int] | None]:
    """The neurons of a question's experts that are worth mounting: without the least ones, which together weigh less
    than `_LEAST` of all that its neurons weigh, and each less than `_SLIGHT` of the heaviest.

    Args:
        experts: of each the weights of its neurons, none below 0, or None for one that is weighed as a whole.

    Returns: of each the indices of the neurons to mount, in order; None for one that was given as None.
    """
    weights = torch.tensor([weight for some in experts for weight in some or ()], dtype=torch.float64)
    order = weights.argsort(stable=True)
    is_kept = torch.ones(len(weights), dtype=torch.bool)
    is_kept[order[weights[order].cumsum(0) < _LEAST * weights.sum()]] = False
    if len(weights):
        is_kept |= weights >= _SLIGHT * weights.max()
    kept = iter(is_kept.tolist())
    return [None if some is None else [index for index, _ in enumerate(some) if next(kept)] for some in experts]


def _neuron_weights(expert: Expert, weight: float, neurons: Sequence[float] | None) -> Tensor:
    """One weight per neuron, (R,)."""
    if neurons is None:
        return torch.full((expert.rank,), float(weight))
    if len(neurons) != expert.rank:
        raise _shape_error(f"{len(neurons)} neuron weights for an expert of rank {expert.rank}")
    return torch.tensor(neurons, dtype=torch.float32)


def combine(
    questions: Sequence[Sequence[Mountable]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    static: Factors | None = None,
    query: QueryExperts | None = None,
    max_norm: float | None = None,
) -> Experts:
    """Put the experts of B questions side by side, so that one fused product serves them all (Eq. 6).

    Args:
        questions: for each question its experts, each with its relevance r_k or, in its place, a weight for each
            of its neurons (see `segment_weights`, `word_weights`). An empty list mounts nothing for that
            question, not even the static expert.
        static, query: mounted with weight 1 for every question that has experts.
        max_norm: see `Experts`.

    Raises:
        ExpertShapeError: experts of several forms or widths, factors of several ranks, or neuron
            weights for factors or of another number than the neurons.
    """
    flat = [item for question in questions for item in question]
    forms = {expert.form for expert, _, _ in flat}
    widths = {expert.width for expert, _, _ in flat}
    if len(forms) > 1 or len(widths) > 1:
        raise _shape_error(f"experts of forms {sorted(forms)} and widths {sorted(widths)} do not mount together")
    is_on = _switch([bool(question) for question in questions], device, dtype)
    small = torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype  # quicker there for few tokens
    static = None if static is None else static.to(device, small)
    query = None if query is None else query.to(device, small)
    if not flat:
        return Experts(is_on=is_on, max_norm=max_norm)
    if forms == {"factors"}:
        factors, weights = _combine_factors(questions)
        return Experts(
            factors=factors.to(device, dtype),
            factor_weights=weights.to(device, dtype),
            static=static,
            query=query,
            is_on=is_on,
            max_norm=max_norm,
        )
    up, down, weights = _combine_neurons(questions, widths.pop(), dtype)
    return Experts(
        up=up.to(device),
        down=down.to(device),
        neuron_weights=weights.to(device, dtype),
        static=static,
        query=query,
        is_on=is_on,
        max_norm=max_norm,
    )


def on_where(are_on: Sequence[bool], experts: Experts) -> Experts:
    """The same static experts for those of B questions that have them on."""
    some = experts.static.dw2 if experts.static is not None else torch.zeros(0)
    return replace(experts, is_on=_switch(are_on, some.device, some.dtype))


def _switch(are_on: Sequence[bool], device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """`is_on` of `Experts`; None where all are."""
    return (
        None if all(are_on) else torch.tensor([float(on) for on in are_on], device=device, dtype=dtype)[:, None, None]
    )


def _combine_neurons(
    questions: Sequence[Sequence[Mountable]], width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`up` (B, D, N), `down` (B, N, D) and weights (B, N), each number copied once; zero past a question's experts."""
    n = max(sum(expert.rank for expert, _, _ in question) for question in questions)
    up = torch.zeros(len(questions), width, n, dtype=dtype)
    down = torch.zeros(len(questions), n, width, dtype=dtype)
    weights = torch.zeros(len(questions), n)
    for row, question in enumerate(questions):
        first = 0
        for expert, weight, neurons in question:
            last = first + expert.rank
            up[row, :, first:last] = expert.tensors["up"]
            down[row, first:last] = expert.tensors["down"]
            weights[row, first:last] = _neuron_weights(expert, weight, neurons)
            first = last
    return up, down, weights


def _combine_factors(
    questions: Sequence[Sequence[Mountable]],
) -> tuple[Factors, Tensor]:
    experts = [expert for question in questions for expert, _, _ in question]
    if len({expert.rank for expert in experts}) > 1:
        raise _shape_error("factors of several ranks do not mount together")
    k = max(len(question) for question in questions)
    zero = {name: torch.zeros_like(tensor) for name, tensor in experts[0].tensors.items()}
    parts = {
        name: torch.stack(
            [
                torch.stack([e.tensors[name] for e, _, _ in question] + [zero[name]] * (k - len(question)))
                for question in questions
            ]
        )
        for name in _NAMES["factors"]
    }
    weights = torch.zeros(len(questions), k)
    for b, question in enumerate(questions):
        for position, (_, weight, neurons) in enumerate(question):
            if neurons is not None:
                raise _shape_error("neuron weights for factors, which are weighed as a whole")
            weights[b, position] = weight
    return Factors(parts["up1"], parts["up2"], parts["dw1"], parts["dw2"]), weights
