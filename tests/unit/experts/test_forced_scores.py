"""Teacher-forced scores against a literal walk along each answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from knowstore.config import GenerationConfig
from knowstore.experts import Expert, Experts, FrozenLLM, Prompt, combine, forced_nats, forced_scores, mount

LAYER = 1
PROMPTS = [
    Prompt("", "Who founded Rome?"),
    Prompt("Passage: The Rhône ends in the sea.\n", "Where does it end?"),
    Prompt("", "When?"),
]


@pytest.fixture
def experts(make_expert: Callable[..., Expert]) -> Experts:
    mounted = [[(make_expert(6, seed=4 + index), 1.0, None)] for index in range(len(PROMPTS))]
    return combine(mounted, device=torch.device("cpu"), dtype=torch.float32)


def walked(llm: FrozenLLM, prompt: Prompt, written: list[int], experts: Experts | None, index: int) -> list[bool]:
    """Whether each token comes first after those before it, one call of the model after another."""
    before = llm.prompt_ids(prompt.before) if prompt.before else []
    ids = before + llm.prompt_ids(prompt.question, is_start=not prompt.before)
    return [
        first_choice(llm, ids + written[:place], experts, index, len(before)) == token
        for place, token in enumerate(written)
    ]


def first_choice(llm: FrozenLLM, ids: list[int], experts: Experts | None, index: int, start: int) -> int:
    if experts is None:
        return int(llm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    with mount(llm.model, experts, LAYER, starts=[start] * len(PROMPTS)):
        return int(llm.model(input_ids=torch.tensor([ids] * len(PROMPTS))).logits[index, -1].argmax())


def tokens_of(llm: FrozenLLM, answer: str) -> list[int]:
    return llm.prompt_ids(f" {answer}", is_start=False)


@pytest.fixture
def answers(tiny_llm: FrozenLLM, experts: Experts) -> list[str]:
    """For each prompt some word, what the model would go on with, and another word."""
    found = []
    for index, prompt in enumerate(PROMPTS):
        before = tiny_llm.prompt_ids(prompt.before) if prompt.before else []
        ids = before + tiny_llm.prompt_ids(prompt.question, is_start=not prompt.before)
        for word in ("Rome", "the", "end", "town", "753", "a", "river", "Lyon", "sea", "z"):
            given = tokens_of(tiny_llm, word)
            token = first_choice(tiny_llm, ids + given, experts, index, len(before))
            answer = f"{word}{tiny_llm.tokenizer.decode([token])} Rome"
            if tokens_of(tiny_llm, answer)[: len(given) + 1] == [*given, token] and answer == " ".join(answer.split()):
                found.append(answer)
                break
    assert len(found) == len(PROMPTS)
    return found


def test_a_forced_score_is_the_share_of_tokens_that_come_first_after_the_right_ones(
    tiny_llm: FrozenLLM, experts: Experts, answers: list[str]
) -> None:
    found = forced_scores(tiny_llm, PROMPTS, answers, experts, LAYER, GenerationConfig())
    for index, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        right = walked(tiny_llm, prompt, tokens_of(tiny_llm, answer), experts, index)
        assert found[index] == pytest.approx(sum(right) / len(right))
        assert any(right)
    assert min(found) < 1


def test_without_experts_the_model_itself_is_scored(tiny_llm: FrozenLLM, answers: list[str]) -> None:
    found = forced_scores(tiny_llm, PROMPTS, answers, None, LAYER, GenerationConfig())
    for index, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        right = walked(tiny_llm, prompt, tokens_of(tiny_llm, answer), None, index)
        assert found[index] == pytest.approx(sum(right) / len(right))


def test_forced_nats_are_those_of_a_walk_along_the_answer(tiny_llm: FrozenLLM, answers: list[str]) -> None:
    found = forced_nats(tiny_llm, PROMPTS, answers, None, LAYER, GenerationConfig())
    for prompt, answer, nats in zip(PROMPTS, answers, found, strict=True):
        before = tiny_llm.prompt_ids(prompt.before) if prompt.before else []
        ids = before + tiny_llm.prompt_ids(prompt.question, is_start=not prompt.before)
        written = tokens_of(tiny_llm, answer)
        logits = tiny_llm.model(input_ids=torch.tensor([ids + written])).logits[0].log_softmax(-1)
        walk = [-float(logits[len(ids) + place - 1, token]) for place, token in enumerate(written)]
        assert nats == pytest.approx(sum(walk) / len(walk), rel=1e-4)


def test_where_the_experts_act_is_as_it_is_told(tiny_llm: FrozenLLM, experts: Experts, answers: list[str]) -> None:
    logits: list[torch.Tensor] = []
    head = tiny_llm.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _head, _args, out: logits.append(out))
    for where in ("question", "all"):
        forced_scores(tiny_llm, PROMPTS, answers, experts, LAYER, GenerationConfig(where=where))
    handle.remove()
    for prompt, one, other in zip(PROMPTS, logits[:3], logits[3:], strict=True):
        assert torch.allclose(one, other, atol=1e-5) == (not prompt.before)
