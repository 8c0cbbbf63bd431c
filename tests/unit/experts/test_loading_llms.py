"""Loading LLMs from directories: Baichuan 2's own form, control tokens as text, and bad directories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu

from knowstore.errors import ConfigError
from knowstore.experts import FrozenLLM, load_llm

WIDTH, N_HEADS, N_BLOCKS, INNER, N_WORDS = 32, 4, 2, 48, 50


@pytest.fixture
def baichuan(tmp_path: Path, tiny_llm_dir: Path) -> tuple[Path, dict[str, Tensor]]:
    """A directory as Baichuan 2 is published: packed projections, a head that is normalised when it is used."""
    torch.manual_seed(0)
    shapes = {"model.embed_tokens.weight": (N_WORDS, WIDTH), "lm_head.weight": (N_WORDS, WIDTH)}
    for n in range(N_BLOCKS):
        shapes |= {
            f"model.layers.{n}.self_attn.W_pack.weight": (3 * WIDTH, WIDTH),
            f"model.layers.{n}.self_attn.o_proj.weight": (WIDTH, WIDTH),
            f"model.layers.{n}.mlp.gate_proj.weight": (INNER, WIDTH),
            f"model.layers.{n}.mlp.up_proj.weight": (INNER, WIDTH),
            f"model.layers.{n}.mlp.down_proj.weight": (WIDTH, INNER),
        }
    weights = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    for name in [
        "model.norm",
        *(f"model.layers.{n}.{part}_layernorm" for n in range(N_BLOCKS) for part in ("input", "post_attention")),
    ]:
        weights[f"{name}.weight"] = torch.rand(WIDTH) + 0.5
    folder = tmp_path / "baichuan"
    shutil.copytree(tiny_llm_dir, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_file(weights, folder / "model.safetensors")
    config = {
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": N_BLOCKS,
        "num_attention_heads": N_HEADS,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "vocab_size": N_WORDS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, weights


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def rotate(x: Tensor) -> Tensor:
    """Rotary positions of (T, heads, head width), the halves of a head paired."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def literal_baichuan(weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    h = weights["model.embed_tokens.weight"][ids]
    for n in range(N_BLOCKS):
        own = {
            k.removeprefix(f"model.layers.{n}."): w for k, w in weights.items() if k.startswith(f"model.layers.{n}.")
        }
        x = rms_norm(h, own["input_layernorm.weight"])
        q, k, v = (x @ own["self_attn.W_pack.weight"].T).view(len(ids), 3, N_HEADS, -1).unbind(1)
        scores = torch.einsum("thd,shd->hts", rotate(q), rotate(k)) / (WIDTH // N_HEADS) ** 0.5
        is_later = torch.ones(len(ids), len(ids)).triu(1).bool()
        mixed = torch.einsum("hts,shd->thd", scores.masked_fill(is_later, -torch.inf).softmax(-1), v).flatten(1)
        h = h + mixed @ own["self_attn.o_proj.weight"].T
        x = rms_norm(h, own["post_attention_layernorm.weight"])
        inner = silu(x @ own["mlp.gate_proj.weight"].T) * (x @ own["mlp.up_proj.weight"].T)
        h = h + inner @ own["mlp.down_proj.weight"].T
    head = weights["lm_head.weight"]
    return rms_norm(h, weights["model.norm.weight"]) @ (head / head.norm(dim=1, keepdim=True)).T


def test_baichuan_checkpoints_give_the_logits_of_their_own_code(baichuan: tuple[Path, dict[str, Tensor]]) -> None:
    folder, weights = baichuan
    llm = load_llm(folder)
    ids = [1, 7, 30, 49, 7, 12]
    with torch.no_grad():
        found = llm.model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, literal_baichuan(weights, ids), rtol=1e-4, atol=1e-4)
    assert (llm.width, llm.n_layers) == (WIDTH, N_BLOCKS)


def test_baichuan_with_alibi_positions_is_refused(baichuan: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = baichuan
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "position_embedding": "ALIBI"}))
    with pytest.raises(ConfigError, match="ALiBi"):
        load_llm(folder)


def test_a_missing_baichuan_tensor_is_named(baichuan: tuple[Path, dict[str, Tensor]]) -> None:
    folder, weights = baichuan
    save_file(
        {name: w for name, w in weights.items() if name != "model.layers.1.mlp.up_proj.weight"},
        folder / "model.safetensors",
    )
    with pytest.raises(ConfigError, match="up_proj"):
        load_llm(folder)


def test_a_missing_tensor_is_not_filled_with_random_numbers(tmp_path: Path, tiny_llm_dir: Path) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(tiny_llm_dir, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers\.2\.mlp\.up_proj"):
        load_llm(folder)


def test_loaded_models_are_frozen(tiny_llm: FrozenLLM) -> None:
    assert not tiny_llm.model.training
    assert not any(parameter.requires_grad for parameter in tiny_llm.model.parameters())


@pytest.mark.parametrize("broken", ["missing", "no config", "no weights", "cut weights", "no json", "no tokenizer"])
def test_a_directory_without_a_readable_llm_is_refused(broken: str, tmp_path: Path, tiny_llm_dir: Path) -> None:
    folder = tmp_path / "llm"
    if broken != "missing":
        shutil.copytree(tiny_llm_dir, folder)
    if broken == "no config":
        (folder / "config.json").unlink()
    elif broken == "no weights":
        (folder / "model.safetensors").unlink()
    elif broken == "cut weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    elif broken == "no json":
        (folder / "config.json").write_text("{")
    elif broken == "no tokenizer":
        for file in folder.glob("*token*"):
            file.unlink()
    with pytest.raises(ConfigError, match="no causal language model") as caught:
        load_llm(folder)
    assert caught.value.__cause__ is not None


def test_names_of_control_tokens_in_a_text_stay_text(tiny_llm: FrozenLLM) -> None:
    text = "Rome<|im_end|> was <|im_start|>founded<|endoftext|>."
    for is_start in (True, False):
        ids = tiny_llm.prompt_ids(text, is_start=is_start)
        assert not set(ids) & set(tiny_llm.tokenizer.all_special_ids)
        assert tiny_llm.tokenizer.decode(ids) == text


def test_answers_stop_at_the_end_of_a_line(tiny_llm: FrozenLLM) -> None:
    stops = [tiny_llm.tokenizer.decode([index]) for index in tiny_llm.stop_ids]
    assert tiny_llm.tokenizer.eos_token_id in tiny_llm.stop_ids
    assert any("\n" in stop for stop in stops)
    assert all("\n" in stop or stop == "<|im_end|>" for stop in stops)
