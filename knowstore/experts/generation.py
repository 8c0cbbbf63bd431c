"""Generating answers with a frozen LLM: prompts to token ids, left-padded batches, the stop, streaming."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from knowstore.config import GenerationConfig
from knowstore.experts.expert import Experts
from knowstore.experts.llm import FrozenLLM
from knowstore.experts.mount import mount
from knowstore.experts.packing import pack


@dataclass(frozen=True)
class Prompt:
    """A question's prompt; `before` stands in front of it and holds passages, or is empty."""

    before: str
    question: str


@dataclass(frozen=True)
class Generated:
    """The text of one answer, when its first token was there, and how many tokens of its prompt were cut, and of its
    question among them."""

    text: str
    first_token_s: float
    n_cut: int
    n_question_cut: int = 0


@dataclass(frozen=True)
class PromptRow:
    """A prompt's token ids, the place where its question starts, and how many tokens were cut as in `Generated`."""

    ids: list[int]
    start: int
    n_cut: int
    n_question_cut: int


class _Stream(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Notes when the first token comes and hands text on as soon as it is final."""

    def __init__(self, llm: FrozenLLM, started: float, on_text: Callable[[str], None] | None) -> None:
        self.llm, self.started, self.on_text = llm, started, on_text
        self.first_token_s = 0.0
        self.ids: list[int] = []
        self.shown = 0
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        if not self.ids:
            self.first_token_s = time.perf_counter() - self.started
        self.ids.extend(value.reshape(-1).tolist())
        if self.on_text is not None:
            text = decode(self.llm, self.ids)
            if not text.endswith("\ufffd"):  # half of a character
                self.on_text(text[self.shown :])
                self.shown = len(text)

    def end(self) -> None:
        pass


def decode(llm: FrozenLLM, ids: Sequence[int]) -> str:
    """The answer that token ids spell: up to the first end of sequence or of a line."""
    text: str = llm.tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.lstrip().split("\n", 1)[0].rstrip()


def generate(
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    experts: Experts | None,
    layer: int,
    config: GenerationConfig,
    *,
    on_text: Callable[[str], None] | None = None,
) -> list[Generated]:
    """Answer B prompts in one batch, each with its own experts, until the model stops or a line ends.

    Args:
        experts: what to mount, for B questions; None mounts nothing.
        layer: 0-based decoder block of the experts.
        on_text: called with pieces of the answer to a single prompt as they come; with beams once, at the end.
    """
    started = time.perf_counter()
    pack(llm.model)
    rows = prompt_rows(llm, prompts, config.max_tokens)
    width = max(len(row.ids) for row in rows)
    pad = llm.tokenizer.pad_token_id if llm.tokenizer.pad_token_id is not None else llm.stop_ids[0]
    n_padded = [width - len(row.ids) for row in rows]
    ids = torch.tensor([[pad] * n + row.ids for n, row in zip(n_padded, rows, strict=True)], device=llm.device)
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in n_padded], device=llm.device)
    is_from_question = config.where == "question" and any(row.start for row in rows)
    positions = [n + row.start for n, row in zip(n_padded, rows, strict=True)] if is_from_question else None
    stream = _Stream(llm, started, on_text) if len(rows) == 1 and config.n_beams == 1 else None
    one_turn = config.one_turn and config.n_beams == 1
    mounted = (
        nullcontext() if experts is None else mount(llm.model, experts, layer, starts=positions, one_turn=one_turn)
    )
    can_stop = config.min_tokens < config.max_tokens
    sampling = {"temperature": config.sampling_temperature} if config.do_sample else {"temperature": None}
    with torch.inference_mode(), mounted:
        out = llm.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=config.max_tokens,
            min_new_tokens=(config.min_tokens or None) if can_stop else None,
            do_sample=config.do_sample,
            num_beams=config.n_beams,
            eos_token_id=llm.stop_ids if can_stop else [len(llm.embeddings)],  # no token at all
            pad_token_id=pad,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            streamer=stream,
            **sampling,
        )
    first = stream.first_token_s if stream is not None else 0.0
    texts = [decode(llm, written[width:].tolist()) for written in out]
    if stream is None and on_text is not None and len(rows) == 1:
        on_text(texts[0])
    return [Generated(text, first, row.n_cut, row.n_question_cut) for text, row in zip(texts, rows, strict=True)]


def prompt_rows(llm: FrozenLLM, prompts: Sequence[Prompt], n_new: int) -> list[PromptRow]:
    """Prompts as token ids that leave room for `n_new` more: what is too long loses the beginning of what stands before
    its question, which is the least likely passage's, then the beginning of the question, but never what the tokenizer
    sets before a text."""
    limit = max_prompt_tokens(llm, n_new)
    first = llm.start_ids
    rows = []
    for prompt in prompts:
        question = llm.prompt_ids(prompt.question, is_start=not prompt.before)
        before = llm.prompt_ids(prompt.before) if prompt.before else []
        whole = before + question
        n_first = len(first) if whole[: len(first)] == first else 0
        n_cut = max(0, len(whole) - limit)
        start = max(n_first, len(before) - n_cut) if before else 0
        n_question_cut = n_cut - (len(before) - start)
        rows.append(PromptRow(whole[:n_first] + whole[n_first + n_cut :], start, n_cut, n_question_cut))
    return rows


def max_prompt_tokens(llm: FrozenLLM, max_new_tokens: int) -> int:
    """The most tokens of a prompt that leave room for so many new ones."""
    longest = getattr(llm.model.config.get_text_config(), "max_position_embeddings", None) or 4096
    return max(16, int(longest) - max_new_tokens)
