"""Threads and asyncio tasks that share one model mount their own experts."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from knowstore.experts import Expert, Experts, FrozenLLM, combine, mount

LAYER = 1
Build = Callable[[str], PreTrainedModel]
MakeExpert = Callable[..., Expert]


def one(expert: Expert) -> Experts:
    return combine([[(expert, 1.0, None)]], device=torch.device("cpu"), dtype=torch.float32)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    out: Tensor = model(input_ids=ids).logits
    return out


@pytest.fixture
def cases(build: Build, token_ids: Tensor, make_expert: MakeExpert) -> tuple[PreTrainedModel, Tensor, list[Experts]]:
    return build("llama"), token_ids[:1], [one(make_expert(rank, seed=rank)) for rank in (1, 2, 3, 4)]


def serial(model: PreTrainedModel, ids: Tensor, experts: list[Experts]) -> list[Tensor]:
    out = []
    for some in experts:
        with mount(model, some, LAYER):
            out.append(logits(model, ids))
    return out


def test_threads_with_different_experts_do_not_meet(cases: tuple[PreTrainedModel, Tensor, list[Experts]]) -> None:
    model, ids, experts = cases
    expected, bare = serial(model, ids, experts), logits(model, ids)
    llm = FrozenLLM(model, None)  # type: ignore[arg-type]
    states = llm.states(ids, LAYER)
    together = threading.Barrier(len(experts) + 2, timeout=30)

    def mounted(index: int) -> bool:
        together.wait()
        is_same = True
        for _ in range(12):
            with mount(model, experts[index], LAYER):
                is_same &= torch.equal(logits(model, ids), expected[index])
        return is_same

    def unmounted() -> bool:
        together.wait()
        return all(torch.equal(logits(model, ids), bare) for _ in range(12))

    def reading() -> bool:
        together.wait()
        found = [llm.states(ids, LAYER) for _ in range(12)]
        return all(torch.equal(a, b) for pair in found for a, b in zip(pair, states, strict=True))

    with ThreadPoolExecutor(len(experts) + 2) as pool:
        jobs = [pool.submit(mounted, index) for index in range(len(experts))]
        jobs += [pool.submit(unmounted), pool.submit(reading)]
        assert [job.result() for job in jobs] == [True] * len(jobs)
    assert torch.equal(logits(model, ids), bare)


def test_a_thread_started_inside_sees_the_bare_model(cases: tuple[PreTrainedModel, Tensor, list[Experts]]) -> None:
    model, ids, experts = cases
    bare = logits(model, ids)
    with mount(model, experts[0], LAYER), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, model, ids).result(), bare)
        here = logits(model, ids)
        assert torch.equal(pool.submit(contextvars.copy_context().run, logits, model, ids).result(), here)
    assert not torch.allclose(here, bare)


def test_asyncio_tasks_mount_their_own_experts(cases: tuple[PreTrainedModel, Tensor, list[Experts]]) -> None:
    model, ids, experts = cases
    expected, bare = serial(model, ids, experts), logits(model, ids)

    async def task(index: int) -> bool:
        with mount(model, experts[index], LAYER):
            await asyncio.sleep(0)
            is_same = torch.equal(logits(model, ids), expected[index])
            await asyncio.sleep(0)
            return is_same and torch.equal(logits(model, ids), expected[index])

    async def run() -> list[bool]:
        return list(await asyncio.gather(*(task(index) for index in range(len(experts)))))

    assert all(asyncio.run(run()))
    assert torch.equal(logits(model, ids), bare)
