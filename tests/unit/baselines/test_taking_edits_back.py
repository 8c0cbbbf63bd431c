"""Whatever a method does to the LLM, it is undone when its block ends, also by an error within."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from knowstore.baselines import Edit, Method, TaughtFact
from knowstore.baselines.lora import Lora, LoraSettings
from knowstore.baselines.memit import Memit, MemitSettings
from knowstore.baselines.prompted import Unedited
from knowstore.baselines.sequences import fact_sequence, writing_loss
from knowstore.baselines.statistics import CorpusSample
from knowstore.experts import FrozenLLM
from knowstore.records import Passage

IDS = torch.arange(3, 23)[None]
Make = Callable[[Sequence[str]], Method]
METHODS: dict[str, Make] = {
    "base": lambda _texts: Unedited(),
    "lora": lambda _texts: Lora(LoraSettings(steps=4)),
    "memit": lambda texts: Memit(CorpusSample(texts), MemitSettings(layers=(0, 1), steps=3, n_contexts=2)),
}


def _state(llm: FrozenLLM) -> dict[str, object]:
    """Everything that a method could leave changed."""
    return {
        "modules": [(name, type(module)) for name, module in llm.model.named_modules()],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llm.model.modules()),
        "gradients": [(name, p.requires_grad, p.grad is None) for name, p in llm.model.named_parameters()],
        "attributes": sorted(vars(llm.model)),
        "mode": llm.model.training,
    }


def _bits(llm: FrozenLLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}


def _logits(llm: FrozenLLM) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = llm.model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_llm_is_bit_for_bit_what_it_was(
    tiny_llm: FrozenLLM, edits: Sequence[Edit], usual_texts: Sequence[str], name: str, fails: bool
) -> None:
    state, bits, logits = _state(tiny_llm), _bits(tiny_llm), _logits(tiny_llm)
    method = METHODS[name](usual_texts)
    method.prepare(tiny_llm)
    try:
        with method.teaching(tiny_llm) as teach:
            teach(edits)
            changed = not torch.equal(_logits(tiny_llm), logits)
            if fails:
                raise RuntimeError("within")
    except RuntimeError:
        assert fails
    assert changed == (name != "base")
    assert _state(tiny_llm) == state
    assert all(torch.equal(bits[key], tensor) for key, tensor in tiny_llm.model.state_dict().items())
    assert torch.equal(_logits(tiny_llm), logits)


@pytest.mark.parametrize("name", ["lora", "memit"])
def test_edits_taught_in_two_parts_are_those_taught_at_once(
    tiny_llm: FrozenLLM, edits: Sequence[Edit], usual_texts: Sequence[str], name: str
) -> None:
    method = METHODS[name](usual_texts)
    method.prepare(tiny_llm)
    with method.teaching(tiny_llm) as teach:
        at_once = teach(edits[:2])
        together = _logits(tiny_llm)
    with method.teaching(tiny_llm) as teach:
        assert 0 < teach(edits[:1]).kept_bytes <= at_once.kept_bytes
        assert not torch.equal(_logits(tiny_llm), together)
        assert teach(edits[1:2]).kept_bytes == at_once.kept_bytes
        assert torch.equal(_logits(tiny_llm), together)


def test_lora_learns_the_facts_and_stops_when_it_knows_them(tiny_llm: FrozenLLM, edits: Sequence[Edit]) -> None:
    row = fact_sequence(tiny_llm, edits[0].facts[0])
    before = float(writing_loss(tiny_llm, [row]).detach())
    with Lora(LoraSettings(steps=40, learning_rate=0.02)).teaching(tiny_llm) as teach:
        edited = teach(edits[:1])
        assert float(writing_loss(tiny_llm, [row]).detach()) < 0.5 * before
        assert edited.kept_bytes == 4 * 8 * sum(
            sum(layer.in_features + layer.out_features for layer in (block.self_attn.q_proj, block.self_attn.v_proj))
            for block in tiny_llm.model.model.layers
        )


def test_a_run_of_lora_repeats_and_leaves_the_random_state_alone(tiny_llm: FrozenLLM, edits: Sequence[Edit]) -> None:
    found = []
    for _ in range(2):
        state = torch.get_rng_state()
        with Lora(LoraSettings(steps=2)).teaching(tiny_llm) as teach:
            teach(edits)
            found.append(_logits(tiny_llm))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1])


def test_an_edit_without_facts_changes_nothing_by_memit(tiny_llm: FrozenLLM, usual_texts: Sequence[str]) -> None:
    memit = METHODS["memit"](usual_texts)
    memit.prepare(tiny_llm)
    logits = _logits(tiny_llm)
    with memit.teaching(tiny_llm) as teach:
        edited = teach([Edit(Passage("Rome."), tuple[TaughtFact, ...]())])
        assert torch.equal(_logits(tiny_llm), logits)
    assert edited.kept_bytes == 0
