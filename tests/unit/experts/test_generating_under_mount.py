"""`model.generate` with experts on: cache, sampling, beams, streaming, batches, and where the experts act."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, TextIteratorStreamer

from knowstore.config import GenerationConfig
from knowstore.experts import Expert, Experts, FrozenLLM, Prompt, Turns, beside, combine, generate, mount
from knowstore.experts.generation import prompt_rows
from knowstore.prompts import passages_prompt, question_prompt

LAYER, N_NEW = 1, 6
MakeExpert = Callable[..., Expert]
Build = Callable[[str], PreTrainedModel]
TEXTS = ("Who founded Rome?", "Where does the river Rhône end, and in which sea?")
GREEDY = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0}


def experts_for(*questions: list[Expert]) -> Experts:
    weighted = [[(expert, 1 / len(question), None) for expert in question] for question in questions]
    return combine(weighted, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def pair(make_expert: MakeExpert) -> tuple[list[Expert], list[Expert]]:
    return [make_expert(8, seed=1)], [make_expert(6, seed=2), make_expert(3, seed=3)]


def left_padded(llm: FrozenLLM, texts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    rows = [llm.prompt_ids(text) for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def generated(llm: FrozenLLM, ids: Tensor, mask: Tensor, **options: object) -> Tensor:
    out: Tensor = llm.model.generate(input_ids=ids, attention_mask=mask, **(GREEDY | options))
    return out[:, ids.shape[1] :]


def test_greedy_answers_are_the_same_with_and_without_key_value_cache(
    tiny_llm: FrozenLLM, pair: tuple[list[Expert], list[Expert]]
) -> None:
    ids, mask = left_padded(tiny_llm, TEXTS)
    bare = generated(tiny_llm, ids, mask)
    with mount(tiny_llm.model, experts_for(*pair), LAYER):
        cached = generated(tiny_llm, ids, mask, use_cache=True)
        assert torch.equal(cached, generated(tiny_llm, ids, mask, use_cache=False))
    assert not torch.equal(cached, bare)
    assert torch.equal(generated(tiny_llm, ids, mask), bare)


def test_a_left_padded_batch_answers_as_each_question_alone(
    tiny_llm: FrozenLLM, pair: tuple[list[Expert], list[Expert]]
) -> None:
    ids, mask = left_padded(tiny_llm, TEXTS)
    with mount(tiny_llm.model, experts_for(*pair), LAYER):
        together = generated(tiny_llm, ids, mask)
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            last = tiny_llm.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    for row, text in enumerate(TEXTS):
        alone, whole = left_padded(tiny_llm, (text,))
        with mount(tiny_llm.model, experts_for(pair[row]), LAYER), torch.no_grad():
            assert torch.equal(generated(tiny_llm, alone, whole)[0], together[row])
            torch.testing.assert_close(tiny_llm.model(input_ids=alone).logits[0, -1], last[row], rtol=1e-4, atol=1e-4)


def test_sampling_repeats_with_its_seed(tiny_llm: FrozenLLM, pair: tuple[list[Expert], list[Expert]]) -> None:
    ids, mask = left_padded(tiny_llm, TEXTS)
    with mount(tiny_llm.model, experts_for(*pair), LAYER):
        found = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            found.append(generated(tiny_llm, ids, mask, do_sample=True, temperature=2.0))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_neuron_whose_word_was_written_has_had_its_turn() -> None:
    turns = Turns(torch.ones(3, 4))
    turns.see(torch.tensor([[0.0, 2.0, 0.5, 0.0], [0.0, 2.0, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert turns.left.all()
    turns.see(torch.tensor([[1.0, 0.0, 3.0, 0.0], [1.0, 0.5, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert turns.left.tolist() == [[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    turns.see(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]))
    assert turns.left.tolist() == [[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    turns.see(torch.zeros(3, 4))
    assert turns.left.tolist() == [[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]
    alone, padded = Turns(torch.ones(1, 1)), Turns(torch.ones(1, 3))
    for fired in (1.0, 0.0):
        alone.see(torch.tensor([[fired]]))
        padded.see(torch.tensor([[fired, 0.0, 0.0]]))
    assert alone.left[0, 0] == padded.left[0, 0] == 0
    Turns(torch.ones(2, 0)).see(torch.ones(2, 0))


def test_behind_a_cache_each_neuron_fires_in_its_turn_alone_and_a_new_text_has_all_turns(
    tiny_llm: FrozenLLM, make_expert: MakeExpert
) -> None:
    model, experts = tiny_llm.model, experts_for([make_expert(2, seed=2)])
    assert experts.up is not None
    assert experts.neuron_weights is not None
    steps = torch.tensor([tiny_llm.prompt_ids(TEXTS[1])[:10]]).split([3, *[1] * 7], 1)
    cache, expected, left, last = DynamicCache(config=model.config), [], [1.0] * 2, None
    states: list[Tensor] = []

    def seen(x: Tensor) -> Tensor:
        states.append(x)
        return torch.zeros_like(x)

    with torch.no_grad():
        for ids in steps:
            weighed = replace(experts, neuron_weights=experts.neuron_weights * torch.tensor([left]))
            with mount(model, weighed, LAYER), beside(model, LAYER, seen):
                expected.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
            fires = ((states[-1][0, -1] @ experts.up[0]).clamp(min=0) * torch.tensor(left)).tolist()
            if last is not None and not fires[last]:
                left[last] = 0.0
            second, first = sorted(fires)
            last = fires.index(first) if 0 < first >= 4 * second else None
        assert 0.0 in left
        with mount(model, experts, LAYER, one_turn=True):
            for _ in range(2):
                cache = DynamicCache(config=model.config)
                for ids, logits in zip(steps, expected, strict=True):
                    found = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
                    torch.testing.assert_close(found, logits)


def test_answers_are_written_in_turns_unless_that_is_off_or_there_are_beams(
    tiny_llm: FrozenLLM, make_expert: MakeExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: list[bool] = []

    def noted(*arguments: Any, one_turn: bool, **options: Any) -> AbstractContextManager[None]:
        how.append(one_turn)
        return mount(*arguments, one_turn=one_turn, **options)

    monkeypatch.setattr("knowstore.experts.generation.mount", noted)
    for config in (GenerationConfig(), GenerationConfig(one_turn=False), GenerationConfig(n_beams=2)):
        generate(tiny_llm, [Prompt("", TEXTS[0])], experts_for([make_expert(8, seed=1)]), LAYER, config)
    assert how == [True, False, False]


def test_several_samples_of_a_question_share_its_experts(
    tiny_llm: FrozenLLM, pair: tuple[list[Expert], list[Expert]]
) -> None:
    ids, mask = left_padded(tiny_llm, TEXTS)
    options = {"do_sample": True, "temperature": 2.0}
    with mount(tiny_llm.model, experts_for(*pair), LAYER):
        torch.manual_seed(7)
        samples = generated(tiny_llm, ids, mask, num_return_sequences=3, **options)
    expanded = [pair[0]] * 3 + [pair[1]] * 3
    with mount(tiny_llm.model, experts_for(*expanded), LAYER):
        torch.manual_seed(7)
        literal = generated(tiny_llm, ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), **options)
    assert torch.equal(samples, literal)


def test_beams_of_a_question_share_its_experts(tiny_llm: FrozenLLM, pair: tuple[list[Expert], list[Expert]]) -> None:
    ids, mask = left_padded(tiny_llm, TEXTS)
    with mount(tiny_llm.model, experts_for(*pair), LAYER):
        together = generated(tiny_llm, ids, mask, num_beams=3)
    for row, text in enumerate(TEXTS):
        alone, whole = left_padded(tiny_llm, (text,))
        with mount(tiny_llm.model, experts_for(*[pair[row]] * 3), LAYER):  # a batch that was expanded before
            assert torch.equal(generated(tiny_llm, alone, whole, num_beams=3)[0], together[row])


def test_streaming_from_a_thread_gives_the_same_text(
    tiny_llm: FrozenLLM, pair: tuple[list[Expert], list[Expert]]
) -> None:
    ids, mask = left_padded(tiny_llm, TEXTS[:1])
    experts = experts_for(pair[0])
    with mount(tiny_llm.model, experts, LAYER):
        expected = tiny_llm.tokenizer.decode(generated(tiny_llm, ids, mask)[0])
    streamer = TextIteratorStreamer(tiny_llm.tokenizer, skip_prompt=True, timeout=30)

    def answer() -> None:
        with mount(tiny_llm.model, experts, LAYER):
            generated(tiny_llm, ids, mask, streamer=streamer)

    thread = threading.Thread(target=answer)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == expected


def literal_greedy(llm: FrozenLLM, row: list[int], start: int, experts: Experts) -> list[int]:
    """Each token from a whole new forward pass, with the experts' output cut off before `start`."""
    ids = list(row)
    for _ in range(N_NEW):
        with torch.no_grad(), mount(llm.model, experts, LAYER, starts=[start]):
            scores = llm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        scores[llm.model.generation_config.eos_token_id] = -torch.inf  # as GREEDY's least number of tokens does
        ids.append(int(scores.argmax()))
    return ids[len(row) :]


def test_experts_from_the_question_onward_equal_a_full_recomputation(
    tiny_llm: FrozenLLM, pair: tuple[list[Expert], list[Expert]]
) -> None:
    befores = ("Passage 1: Lyon lies on the Rhône.\n\n", "Passage 1: Romulus.\n\n")
    rows = [
        [*tiny_llm.prompt_ids(b), *tiny_llm.prompt_ids(t, is_start=False)] for b, t in zip(befores, TEXTS, strict=True)
    ]
    before = [len(tiny_llm.prompt_ids(text)) for text in befores]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    starts = [width - len(row) + n for row, n in zip(rows, before, strict=True)]
    with mount(tiny_llm.model, experts_for(*pair), LAYER, starts=starts):
        cached = generated(tiny_llm, ids, mask)
        assert torch.equal(cached, generated(tiny_llm, ids, mask, use_cache=False))
        beams = generated(tiny_llm, ids, mask, num_beams=2)
        assert torch.equal(beams, generated(tiny_llm, ids, mask, num_beams=2, use_cache=False))
    with mount(tiny_llm.model, experts_for(*pair), LAYER):
        assert not torch.equal(cached, generated(tiny_llm, ids, mask))
    for row, tokens in enumerate(rows):
        assert literal_greedy(tiny_llm, tokens, before[row], experts_for(pair[row])) == cached[row].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "mistral"])
def test_a_start_holds_while_tokens_come_one_by_one(
    name: str, build: Build, token_ids: Tensor, make_expert: MakeExpert
) -> None:
    model, start = build(name), 4
    with torch.no_grad(), mount(model, experts_for([make_expert(16)], [make_expert(16)]), LAYER, starts=[start, start]):
        whole = model(input_ids=token_ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = token_ids.split([2, 1, 1, 1, 2], 1)
        steps = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_answers_through_generate_follow_the_experts(
    tiny_llm: FrozenLLM, pair: tuple[list[Expert], list[Expert]]
) -> None:
    prompts = [Prompt("", text) for text in TEXTS]
    config = GenerationConfig(max_tokens=N_NEW)
    together = generate(tiny_llm, prompts, experts_for(*pair), LAYER, config)
    pieces: list[str] = []
    alone = [
        generate(
            tiny_llm, [prompts[row]], experts_for(pair[row]), LAYER, config, on_text=pieces.append if row == 0 else None
        )
        for row in (0, 1)
    ]
    assert [answer.text for answer in together] == [answers[0].text for answers in alone]
    assert "".join(pieces).rstrip("\ufffd") == alone[0][0].text.rstrip("\ufffd")
    assert [a.text for a in generate(tiny_llm, prompts, None, LAYER, config)] != [a.text for a in together]
    pieces.clear()
    [beamed] = generate(tiny_llm, prompts[:1], None, LAYER, replace(config, n_beams=2), on_text=pieces.append)
    assert pieces == [beamed.text]


def test_a_model_that_would_stop_goes_on_to_the_least_number_of_tokens(tiny_llm: FrozenLLM) -> None:
    [text] = TEXTS[:1]
    stops = {"stop_ids": list(range(int(tiny_llm.embeddings.shape[0]) - 1))}
    llm = FrozenLLM(tiny_llm.model, tiny_llm.tokenizer)
    vars(llm).update(stops)
    [short] = generate(llm, [Prompt("", text)], None, LAYER, GenerationConfig(max_tokens=N_NEW))
    [long] = generate(llm, [Prompt("", text)], None, LAYER, GenerationConfig(max_tokens=N_NEW, min_tokens=N_NEW))
    assert len(long.text) > len(short.text)


def test_the_likeliest_passage_stands_beside_the_question_and_is_the_last_to_be_cut(tiny_llm: FrozenLLM) -> None:
    passages = [("Rome", "Rome was founded by Romulus."), ("Rhône", "The river Rhône ends in the sea. " * 300)]
    question = question_prompt(TEXTS[0])
    [row] = prompt_rows(tiny_llm, [Prompt(passages_prompt(passages), question)], N_NEW)
    ids = tiny_llm.prompt_ids(question, is_start=False)
    likeliest = tiny_llm.prompt_ids(passages_prompt(passages[:1]), is_start=False)
    assert row.n_cut > 0
    assert row.n_question_cut == 0
    assert len(row.ids) == tiny_llm.model.config.max_position_embeddings - N_NEW
    assert row.ids[row.start :] == ids
    assert row.ids[row.start - len(likeliest) : row.start] == likeliest
    first = tiny_llm.prompt_ids("")
    assert row.ids[: len(first)] == first


@pytest.mark.parametrize("before", ["", passages_prompt([("Rome", "Romulus.")])])
@pytest.mark.parametrize("first", [[], [5]])
def test_a_question_as_long_as_the_model_leaves_no_room_for_passages(
    tiny_llm: FrozenLLM, before: str, first: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    question = question_prompt("Who founded Rome " * 600)
    asked, read = (tiny_llm.prompt_ids(text, is_start=False) for text in (question, before))
    plain = FrozenLLM.prompt_ids
    monkeypatch.setattr(
        FrozenLLM, "prompt_ids",
        lambda llm, text, *, is_start=True: (first if is_start else []) + plain(llm, text, is_start=False),
    )  # fmt: skip
    [row] = prompt_rows(tiny_llm, [Prompt(before, question)], N_NEW)
    n_kept = tiny_llm.model.config.max_position_embeddings - N_NEW - len(first)
    assert row.ids == first + asked[-n_kept:]
    assert row.start == (len(first) if before else 0)
    assert row.n_question_cut == len(asked) - n_kept
    assert row.n_cut == len(asked) - n_kept + len(read)


def test_the_models_own_settings_for_generation_are_not_followed(
    tiny_llm: FrozenLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, config = [Prompt("", text) for text in TEXTS], GenerationConfig(max_tokens=N_NEW, min_tokens=N_NEW)
    wanted = [one.text for one in generate(tiny_llm, prompts, None, LAYER, config)]
    for name, value in {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "temperature": 0.1}.items():
        monkeypatch.setattr(tiny_llm.model.generation_config, name, value)
    assert [one.text for one in generate(tiny_llm, prompts, None, LAYER, config)] == wanted
