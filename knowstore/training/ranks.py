"""Several processes that train one model together, as `torchrun` starts them: each takes its share of a step's batches,
gradients are averaged over all, and the first alone decides, validates and writes.

The gradients are averaged here and not by `DistributedDataParallel`, which hooks itself into the `forward` of one
module: a step runs parts of the hypernetwork, not its `forward`, and which parts depends on where the run is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

_LONGEST_WAIT = timedelta(hours=2)  # the others wait while the first validates

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One of `size` processes that train together, the `rank`-th; by default the only one."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one decides, validates and writes."""
        return self.rank == 0

    def of_first(self, value: T) -> T:
        """The first process's `value`, in all of them; it is pickled."""
        if self.size == 1:
            return value
        box: list[T] = [value]
        distributed.broadcast_object_list(box, src=0, device=self._device)
        return box[0]

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Write the first process's numbers into `tensors` of all."""
        if self.size > 1:
            with torch.no_grad():
                for tensor in tensors:
                    sent = tensor.detach().to(self._device).contiguous()
                    distributed.broadcast(sent, src=0)
                    tensor.copy_(sent)

    def average(self, parameters: Sequence[nn.Parameter], numbers: Sequence[float] = ()) -> list[float]:
        """Replace every gradient by its mean over all processes, and give the means of some numbers.

        A parameter without a gradient in one process counts as zero there; without any it stays without.
        """
        if self.size == 1:
            return list(numbers)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        has_gradient = torch.tensor([float(p.grad is not None) for p in parameters])
        sent = torch.cat([
            torch.tensor(numbers, dtype=torch.float32).to(self._device), has_gradient.to(self._device),
            *(part.detach().float().flatten().to(self._device) for part in parts),
        ])  # fmt: skip
        distributed.all_reduce(sent)
        sent /= self.size
        n = len(numbers) + len(parts)
        means, are_any = sent[: len(numbers)].tolist(), sent[len(numbers) : n].tolist()
        gradients = torch.split(sent[n:], [p.numel() for p in parts])
        for parameter, mean, is_any in zip(parameters, gradients, are_any, strict=True):
            parameter.grad = mean.view_as(parameter).to(parameter) if is_any else None
        return means

    @property
    def _device(self) -> torch.device:
        """Where numbers are when they are sent: NCCL takes them from its GPU only."""
        is_nccl = distributed.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the processes that `torchrun` started with this one; without it this one is alone.

    Args:
        device: `cpu`, where they talk by gloo, or `cuda`, by NCCL: `cuda` then means a GPU of its own for each process
            of a machine.

    Yields: which of them this process is. A process group that was joined before is used as it is.
    """
    is_here = distributed.is_initialized()
    if not (is_here or distributed.is_torchelastic_launched()):
        yield Ranks()
        return
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.set_device(distributed.get_node_local_rank())
    if not is_here:
        distributed.init_process_group("nccl" if is_cuda else "gloo", timeout=_LONGEST_WAIT)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        if not is_here:
            distributed.destroy_process_group()
