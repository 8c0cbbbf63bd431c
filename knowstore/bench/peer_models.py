"""What LangChain and LlamaIndex are given: the store's own encoder and language model, and greedy decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from knowstore.bench.systems import PromptName
from knowstore.experts import FrozenLLM
from knowstore.prompts import passages_prompt, question_prompt
from knowstore.records import Passage
from knowstore.retrieval import Retriever


def whole_text(passage: Passage) -> str:
    """A passage as one text, as the store's retriever reads it: its title, if any, on a line before the text."""
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text


def short_prompt(found: Sequence[tuple[str, str]], question: str) -> str:
    """The store's prompt for a question and the passages that were found, each as its whole text and its title."""
    parts = [(title, text.removeprefix(f"{title}\n") if title else text) for text, title in found]
    return passages_prompt(parts) + question_prompt(question)


def embed_passages(retriever: Retriever, texts: Sequence[str]) -> list[list[float]]:
    """The vectors (E,) of texts that `whole_text` gave, the same as those of their passages in a store."""
    encoded = retriever.encode_passages([Passage(text) for text in texts], [()] * len(texts))
    return [vector.tolist() for vector, _ in encoded]


def decoding(llm: FrozenLLM, prompt: PromptName) -> dict[str, Any]:
    """Arguments of `generate` for greedy decoding: with the short prompt it stops where the store's does, at an end of
    sequence or line, with a peer's own only at the tokenizer's end of sequence, for its answers may have lines."""
    ends = llm.stop_ids if prompt == "short" else [llm.tokenizer.eos_token_id]
    pad = llm.tokenizer.pad_token_id
    return {
        "do_sample": False, "temperature": None, "top_p": None, "top_k": None, "eos_token_id": ends,
        "pad_token_id": llm.stop_ids[0] if pad is None else pad,
    }  # fmt: skip


def is_chat_model(llm: FrozenLLM) -> bool:
    """Whether the tokenizer says how messages are put to the model."""
    return bool(llm.tokenizer.chat_template)
