"""Changing weights of a frozen LLM for the time of a `with` block, finding those that editors change, and hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from knowstore.errors import MountError
from knowstore.experts import FrozenLLM
from knowstore.experts.llm import ffn

Hook = Callable[[tuple[Any, ...], Any], Any]


@contextmanager
def restoring(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Whatever is written to the parameters inside, they end bit for bit as they were."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)


def down_projection(model: PreTrainedModel, layer: int) -> nn.Linear:
    """The last linear map of the FFN of the 0-based block `layer`: its input is the FFN's inner activation, its output
    the FFN's.

    Raises:
        MountError: no such block, or an FFN that does not end in a linear map of the model's width.
    """
    width = int(model.get_input_embeddings().weight.shape[1])
    _, last = ffn(model, layer)
    found = [part for part in last.modules() if isinstance(part, nn.Linear) and part.out_features == width]
    if not found:
        raise MountError(
            f"the FFN of block {layer} of {type(model).__name__} has no linear map to width {width}",
            kept="the model is as it was",
            fix="edit a model whose FFNs end in `torch.nn.Linear`, such as Llama's",
        )
    return found[-1]


def run_through(llm: FrozenLLM, ids: Tensor, layer: int) -> None:
    """Run right-padded token ids (B, T) through the blocks up to the 0-based `layer`, without gradients."""
    with torch.no_grad():
        if layer + 1 < llm.n_layers:
            llm.states(ids, layer + 1)
        else:
            llm.model.base_model(input_ids=ids.to(llm.device), use_cache=False)


@contextmanager
def hooked(modules: Sequence[nn.Module], functions: Sequence[Hook]) -> Iterator[None]:
    """At every call of each module its function is called with the inputs and the output; what it gives, unless None,
    takes the output's place."""
    handles = [
        module.register_forward_hook(lambda _module, args, output, function=function: function(args, output))
        for module, function in zip(modules, functions, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """For each module a list that takes its input at every call."""
    seen: list[list[Tensor]] = [[] for _ in modules]

    def take(kept: list[Tensor], args: tuple[Any, ...], _output: Any) -> None:
        kept.append(args[0])

    with hooked(modules, [partial(take, kept) for kept in seen]):
        yield seen
