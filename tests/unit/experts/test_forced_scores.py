"""Teacher-forced scores against a literal walk along each answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from knowstore.experts import Expert, Experts, FrozenLLM, Prompt, combine, forced_scores, mount

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


@pytest.fixture
def targets(tiny_llm: FrozenLLM, experts: Experts) -> list[str]:
    """For each prompt the piece of text that suits the model best, then something else, and the end of the line."""
    pieces = [tiny_llm.tokenizer.decode([token]) for token in range(len(tiny_llm.embeddings))]
    pieces = [text for token, text in enumerate(pieces) if tiny_llm.prompt_ids(text, is_start=False) == [token]]
    best = [max(pieces, key=lambda text: literal(tiny_llm, p, text, experts, i)) for i, p in enumerate(PROMPTS)]
    return [f"{text} Rome\n" for text in best]


def literal(llm: FrozenLLM, prompt: Prompt, target: str, experts: Experts | None, index: int) -> float:
    before = llm.prompt_ids(prompt.before) if prompt.before else []
    ids = before + llm.prompt_ids(prompt.question, is_start=not prompt.before)
    right = 0
    written = llm.prompt_ids(target, is_start=False)
    for token in written:
        if experts is None:
            logits = llm.model(input_ids=torch.tensor([ids])).logits
        else:
            rows = torch.tensor([ids] * len(PROMPTS))
            with mount(llm.model, experts, LAYER, starts=[len(before)] * len(PROMPTS)):
                logits = llm.model(input_ids=rows).logits[index : index + 1]
        right += int(logits[0, -1].argmax()) == token
        ids = [*ids, token]
    return right / len(written)


def test_a_forced_score_is_the_share_of_tokens_that_come_first_after_the_right_ones(
    tiny_llm: FrozenLLM, experts: Experts, targets: list[str]
) -> None:
    found = forced_scores(tiny_llm, PROMPTS, targets, experts, LAYER)
    expected = [literal(tiny_llm, p, t, experts, i) for i, (p, t) in enumerate(zip(PROMPTS, targets, strict=True))]
    assert found == pytest.approx(expected)
    assert max(found) > 0
    assert min(found) < 1


def test_without_experts_the_model_itself_is_scored(tiny_llm: FrozenLLM, targets: list[str]) -> None:
    found = forced_scores(tiny_llm, PROMPTS, targets, None, LAYER)
    assert found == pytest.approx(
        [literal(tiny_llm, p, t, None, i) for i, (p, t) in enumerate(zip(PROMPTS, targets, strict=True))]
    )


def test_where_the_experts_act_is_as_it_is_told(tiny_llm: FrozenLLM, experts: Experts, targets: list[str]) -> None:
    logits: list[torch.Tensor] = []
    head = tiny_llm.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _head, _args, out: logits.append(out))
    n_tokens = [len(tiny_llm.prompt_ids(target, is_start=False)) for target in targets]
    for where in ("question", "all"):
        forced_scores(tiny_llm, PROMPTS, targets, experts, LAYER, where=where)
    handle.remove()
    for index, (one, other) in enumerate(zip(*(each.split(n_tokens) for each in logits), strict=True)):
        assert torch.allclose(one, other, atol=1e-5) == (not PROMPTS[index].before)
