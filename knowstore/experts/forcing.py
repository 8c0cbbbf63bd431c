"""Scores of answers that are given token by token, beside those of answers that the model writes alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from knowstore.config import GenerationConfig
from knowstore.experts.expert import Experts
from knowstore.experts.generation import Prompt, prompt_rows
from knowstore.experts.llm import FrozenLLM
from knowstore.experts.mount import mount
from knowstore.experts.packing import pack
from knowstore.prompts import answer_target


def forced_scores(
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    experts: Experts | None,
    layer: int,
    config: GenerationConfig,
) -> list[float]:
    """The teacher-forced score of papers on model editing: the share of an answer's tokens that are the model's first
    choice when the right ones stand before them.

    It flatters: a model that begins a wrong answer is put right after every token, and need not stop. Exact match of
    what the model writes alone does not.

    Args:
        prompts: B prompts, as for `generate`.
        answers: what each is to be answered with.
        experts: what to mount, for B questions; None mounts nothing.
        layer: 0-based decoder block of the experts.
        config: as for `generate`, of which `where` and the room that `max_tokens` leave count.

    Returns: B shares from 0 to 1.
    """
    forced = _forced(llm, prompts, answers, experts, layer, config)
    return [float((logits.argmax(-1) == ids).float().mean()) for logits, ids in forced]


def forced_nats(
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    experts: Experts | None,
    layer: int,
    config: GenerationConfig,
) -> list[float]:
    """Mean of minus the log-probability of an answer's tokens, each behind the right ones; arguments as for
    `forced_scores`.

    Returns: B numbers of nats per token.
    """
    forced = _forced(llm, prompts, answers, experts, layer, config)
    return [float(cross_entropy(logits.float(), ids)) for logits, ids in forced]


def _forced(
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    experts: Experts | None,
    layer: int,
    config: GenerationConfig,
) -> list[tuple[Tensor, Tensor]]:
    """For each answer the logits (N, vocabulary) before its N tokens, and the tokens (N,)."""
    pack(llm.model)
    written = [llm.prompt_ids(answer_target(answer).rstrip("\n"), is_start=False) for answer in answers]
    rows = prompt_rows(llm, prompts, max(config.max_tokens, *map(len, written)))
    whole = [row.ids + ids for row, ids in zip(rows, written, strict=True)]
    width = max(map(len, whole))
    ids = torch.tensor([some + [0] * (width - len(some)) for some in whole], device=llm.device)  # (B, T)
    is_written = torch.zeros_like(ids, dtype=torch.bool)
    for index, row in enumerate(rows):
        is_written[index, len(row.ids) : len(whole[index])] = True
    is_from_question = config.where == "question" and any(row.start for row in rows)
    starts = [row.start for row in rows] if is_from_question else None
    mounted = nullcontext() if experts is None else mount(llm.model, experts, layer, starts=starts)
    with torch.inference_mode(), mounted:
        final = llm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = llm.model.get_output_embeddings()
        return [
            (head(states[:-1][chosen[1:]]), row[chosen])
            for states, row, chosen in zip(final, ids, is_written, strict=True)
        ]
