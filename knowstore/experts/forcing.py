"""Scores of answers that are given token by token, beside those of answers that the model writes alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from knowstore.config import Where
from knowstore.experts.expert import Experts
from knowstore.experts.generation import Prompt, prompt_rows
from knowstore.experts.llm import FrozenLLM
from knowstore.experts.mount import mount
from knowstore.experts.packing import pack


def forced_scores(
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    targets: Sequence[str],
    experts: Experts | None,
    layer: int,
    *,
    where: Where = "question",
) -> list[float]:
    """The teacher-forced score that papers on model editing report: the share of an answer's tokens that are the
    model's first choice when the right ones stand before them.

    It flatters: a model that begins a wrong answer is put right after every token. Exact match of what the model
    writes alone does not.

    Args:
        prompts: B prompts, as for `generate`.
        targets: what each is to go on with, the end of the line included.
        experts: what to mount, for B questions; None mounts nothing.
        layer: 0-based decoder block of the experts.
        where: as `GenerationConfig.where`.

    Returns: B shares from 0 to 1.
    """
    pack(llm.model)
    written = [llm.prompt_ids(target, is_start=False) for target in targets]
    rows = prompt_rows(llm, prompts, max(map(len, written)))
    whole = [row.ids + ids for row, ids in zip(rows, written, strict=True)]
    width = max(map(len, whole))
    ids = torch.tensor([some + [0] * (width - len(some)) for some in whole], device=llm.device)  # (B, T)
    is_written = torch.zeros_like(ids, dtype=torch.bool)
    for index, row in enumerate(rows):
        is_written[index, len(row.ids) : len(whole[index])] = True
    starts = [row.start for row in rows] if where == "question" and any(row.start for row in rows) else None
    mounted = nullcontext() if experts is None else mount(llm.model, experts, layer, starts=starts)
    with torch.inference_mode(), mounted:
        final = llm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = llm.model.get_output_embeddings()(final[:, :-1][is_written[:, 1:]])
    is_right = (logits.argmax(-1) == ids[is_written]).float().cpu()
    return [float(part.mean()) for part in torch.split(is_right, [len(some) for some in written])]
