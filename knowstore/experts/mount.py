"""Mounting: add experts beside one FFN of a frozen model for the time of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from knowstore.errors import MountError
from knowstore.experts.expert import Experts, Turns, expert_output, query_output
from knowstore.experts.llm import blocks_owner, ffn, first_input, hooks_lock

Args = tuple[Any, ...]
Kwargs = dict[str, Any] | None
_mounted_here: ContextVar[frozenset[int]] = ContextVar("knowstore_mounted_here", default=frozenset())


@contextmanager
def mount(
    model: PreTrainedModel,
    experts: Experts,
    layer: int = 12,
    *,
    starts: Sequence[int] | None = None,
    one_turn: bool = False,
) -> Iterator[None]:
    """Add the weighted experts' output to one FFN of a frozen model (Eq. 3 and 6), and the query experts' below it.

    `model.generate` works inside with all its options; beams and several samples of a question share its
    experts. Call the model as a whole, not one of its blocks. The experts act in the thread (or asyncio task) that
    entered the `with` block and in no other, so threads that share a model can each mount their own. `with` blocks
    nest: outputs add up.

    Args:
        model: causal LM of hidden width D.
        experts: for B questions, B being the batch that the model is called with; see `combine`.
        layer: 0-based decoder block, so 12 is the thirteenth.
        starts: for each of the B questions the position, counted with left padding, from which its experts
            act; passages that stand before the question in the prompt are then read without them. None
            lets the experts act everywhere.
        one_turn: while texts are written token by token behind a cache, a neuron whose word was written adds nothing
            more, see `Turns`; not for beams, which change places.

    Yields: nothing; the model is changed in place until the block ends, then exactly what it was.

    Raises:
        MountError: no such block, the experts' D is not the model's, or as many `starts` as questions are
            missing; nothing was mounted. Also when the model is called with a batch that is no multiple of B.
    """
    ffn(model, layer)
    width = int(model.get_input_embeddings().weight.shape[1])
    if experts.width not in (0, width):
        raise MountError(
            f"experts of width {experts.width} on a model of width {width}",
            kept="nothing was mounted",
            fix="mount experts that were generated for this model",
        )
    if starts is not None and experts.n_questions not in (0, len(starts)):
        raise MountError(
            f"{len(starts)} start positions for the experts of {experts.n_questions} questions",
            kept="nothing was mounted",
            fix="give one start position for each question",
        )
    state = _Mounted(experts, None if starts is None else torch.tensor(list(starts)))
    some = [_Beside(state, layer, state.expert_output if one_turn else expert_output)]
    if experts.query is not None:
        some += [
            _Beside(state, below, partial(query_output, index)) for index, below in enumerate(experts.query.layers)
        ]
    with _hooked(model, state, some):
        yield


@contextmanager
def beside(model: PreTrainedModel, layer: int, output: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Add `output` of its input (B, T, D) to one FFN of a frozen model, in this thread and until the block ends.

    Args:
        model, layer: as for `mount`, inside or around which it may stand.
        output: gives (B, T, D); gradients reach what it is made of.

    Raises:
        MountError: no such block; nothing was mounted.
    """
    with _hooked(model, state := _Mounted(Experts(), None), [_Beside(state, layer, lambda _, x: output(x))]):
        yield


@contextmanager
def _hooked(model: PreTrainedModel, state: _Mounted, some: Sequence[_Beside]) -> Iterator[None]:
    """Hooks on the FFNs of their blocks for the time of a `with` block."""
    parts = [ffn(model, one.layer) for one in some]
    with hooks_lock:
        handles = [blocks_owner(model).register_forward_pre_hook(state.take_call, with_kwargs=True)]
        for one, (first, last) in zip(some, parts, strict=True):
            if first is not last:
                handles.append(first.register_forward_pre_hook(one.take_input, with_kwargs=True))
            handles.append(last.register_forward_hook(one.add_output, with_kwargs=True))
    token = _mounted_here.set(_mounted_here.get() | {id(state)})
    try:
        yield
    finally:
        with hooks_lock:
            for handle in handles:
                handle.remove()
        _mounted_here.reset(token)


class _Mounted:
    """What the hooks of one `mount` share. Another thread may meet a hook while it is being put on or taken off,
    and then calls it without keyword arguments; so these have a default."""

    def __init__(self, experts: Experts, starts: Tensor | None) -> None:
        self.starts = starts
        self.n_questions = experts.n_questions
        self.copies = {1: experts}
        self.n_sequences, self.offset = 1, 0
        self.turns: Turns | None = None

    @property
    def is_here(self) -> bool:
        return id(self) in _mounted_here.get()

    def take_call(self, _owner: nn.Module, args: Args, kwargs: Kwargs = None) -> None:
        if self.is_here:
            named = kwargs or {}
            inputs = (*args[:1], named.get("input_ids"), named.get("inputs_embeds"))
            self.n_sequences = next((one.shape[0] for one in inputs if one is not None), 1)
            past = named.get("past_key_values")
            self.offset = 0 if past is None else int(past.get_seq_length())

    def experts_for(self, n_sequences: int) -> Experts:
        """The experts of a batch that holds some sequences of each question."""
        n = self.n_questions
        if n and n_sequences % n:
            raise MountError(
                f"the model was called with {n_sequences} sequences, experts are mounted for {n} questions",
                kept="the model's weights are as they were",
                fix="call it with one sequence, or a fixed number of beams or samples, for each question",
            )
        n_copies = n_sequences // n if n else 1
        if n_copies not in self.copies:
            self.copies[n_copies] = self.copies[1].repeat(n_copies)
        return self.copies[n_copies]

    def expert_output(self, experts: Experts, x: Tensor) -> Tensor:
        """What the experts add, each neuron in its turn; a text that begins anew has all turns again."""
        if experts.neuron_weights is not None and (self.turns is None or not self.offset):
            self.turns = Turns(experts.neuron_weights)
        return expert_output(experts, x, self.turns)

    def from_start(self, out: Tensor) -> Tensor:
        """`out` (B, T, D), zero before each question's start."""
        if self.starts is None:
            return out
        starts = self.starts.to(out.device).repeat_interleave(out.shape[0] // len(self.starts))
        positions = torch.arange(self.offset, self.offset + out.shape[1], device=out.device)
        return out * (positions[None] >= starts[:, None])[..., None]


class _Beside:
    """The hooks beside the FFN of one block; `output` gives what is added for an input (B, T, D).

    A whole FFN's input is looked at when it has given its output; it must not have written into it.
    """

    def __init__(self, state: _Mounted, layer: int, output: Callable[[Experts, Tensor], Tensor]) -> None:
        self.state, self.layer, self.output = state, layer, output
        self.x: Tensor | None = None

    def take_input(self, _first: nn.Module, args: Args, kwargs: Kwargs = None) -> None:
        """Of an FFN whose parts the block holds."""
        if self.state.is_here:
            self.x = first_input(args, kwargs)

    def add_output(self, _last: nn.Module, args: Args, *rest: Any) -> Any:
        if not self.state.is_here:
            return None
        kwargs, output = rest if len(rest) == 2 else (None, *rest)
        x, self.x = first_input(args, kwargs) if self.x is None else self.x, None
        main = output[0] if isinstance(output, tuple) else output
        if x.dim() == 2:  # a block that flattens its tokens
            x = x.reshape(self.state.n_sequences, -1, x.shape[-1])
        added = self.state.from_start(self.output(self.state.experts_for(x.shape[0]), x))
        total = main + added.reshape(main.shape).to(main.dtype)
        return (total, *output[1:]) if isinstance(output, tuple) else total
