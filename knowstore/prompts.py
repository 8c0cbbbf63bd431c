"""The prompts that training, answering and evaluation share; standard library only.

Plain text, no chat template: an answer follows `Answer:` on the same line and ends with the line.
"""

from __future__ import annotations

from collections.abc import Sequence


def question_prompt(question: str) -> str:
    """The prompt that asks `question` alone (the paper's W/o-RAG)."""
    return f"Question: {' '.join(question.split()).rstrip('?').rstrip()}?\nAnswer:"


def passages_prompt(passages: Sequence[tuple[str, str]]) -> str:
    """What stands before the question when passages are read as well.

    Args:
        passages: (title, text), the likeliest first. Each takes a line, the likeliest the last one: a small model reads
            best what stands beside the question.
    """
    lines = [f"Passage: {title + '. ' if title else ''}{text}" for title, text in reversed(passages)]
    return "\n".join(" ".join(line.split()) for line in lines) + "\n"


def answer_target(answer: str) -> str:
    """What the LLM is trained to write after `question_prompt`, the stop included."""
    return f" {' '.join(answer.split())}\n"
