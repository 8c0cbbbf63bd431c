"""The `tokens` hypernetwork: one neuron for each telling token of a passage, from an analytic start.

A passage is read once by the frozen LLM up to the FFN of the mount layer, which gives a state x_t (D) of each of
its tokens in context. Each sentence (segment) then gets, with u_w a unit vector that raises the LLM's own logit of
word w when it is added to the residual stream:

    key of token t      fires where the LLM is in a state like x_t: x_t whitened, less a threshold
    value of token t    the words near t, each along its u_w, weighted by how rare and important it is
    bag                 one neuron that fires where the answer is being written, with all words of the segment

Before training the keys, the bag and the values are made from statistics of the frozen LLM alone (its embeddings, and
the second moments of its FFN inputs over questions); training then learns which words matter, and when. Inner products
with a constant direction (`const`, about 1 for every state) stand in for the bias that Eq. 2 does not have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from knowstore.errors import HypernetworkError
from knowstore.experts.expert import Expert, Factors
from knowstore.experts.hypernetwork import Hypernetwork, HypernetworkConfig, Latent, PassageInput
from knowstore.experts.llm import FrozenLLM, pad_ids

_MAX_SEGMENT_TOKENS = 255


@dataclass(frozen=True)
class TokensConfig(HypernetworkConfig):
    """Sizes of the `tokens` hypernetwork.

    `key_width` and `code_width` are the two parts of a token's latent; `encoder_width`, `encoder_layers` and
    `encoder_heads` size the bidirectional encoder of a segment; a token's value reaches `reach` tokens to each
    side; tokens rarer than `min_rarity` (0 to 1) get a neuron; `static_rank` is the rank of the static expert;
    a passage is read up to `max_tokens`.
    """

    kind: ClassVar[str] = "tokens"
    vocabulary: int = 49152
    key_width: int = 160
    code_width: int = 64
    encoder_width: int = 256
    encoder_layers: int = 2
    encoder_heads: int = 4
    reach: int = 12
    min_rarity: float = 0.1
    static_rank: int = 32
    max_tokens: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_width % self.encoder_heads:
            raise HypernetworkError(
                f"encoder_width {self.encoder_width} is no multiple of encoder_heads {self.encoder_heads}",
                kept="no hypernetwork was made", fix="use a width that the heads share evenly",
            )  # fmt: skip


def _zero(inner: int, outer: int) -> nn.Linear:
    linear = nn.Linear(inner, outer)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _identity(width: int) -> nn.Linear:
    linear = nn.Linear(width, width, bias=False)
    nn.init.eye_(linear.weight)
    return linear


@dataclass(frozen=True)
class Segments:
    """S segments of passages, padded to T tokens: states `x` (S, T, D), `ids` (S, T), `mask` (S, T)."""

    x: Tensor
    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class TokenLatents:
    """What stands before the last linear map: `key` (S, T, key_width), `code` (S, T, code_width) and the
    importance `weight` (S, T) of each token, 0 where there is none."""

    key: Tensor
    code: Tensor
    weight: Tensor


class TokensHypernetwork(Hypernetwork):
    """See the module's docstring; `tokens_start.analytic_start` fills the statistics in."""

    config: TokensConfig
    x_mean: Tensor
    const: Tensor
    rarity: Tensor
    word_mean: Tensor
    word_map: Tensor

    def __init__(self, config: TokensConfig) -> None:
        super().__init__()
        self.config = config
        D, W, C = config.width, config.encoder_width, config.code_width
        for name, shape in (
            ("x_mean", (D,)),
            ("const", (D,)),
            ("rarity", (config.vocabulary,)),
            ("word_mean", (D,)),
            ("word_map", (D, D)),
        ):
            self.register_buffer(name, torch.zeros(shape))
        self.key_in = nn.Linear(D, config.key_width, bias=False)
        self.key_out = nn.Linear(config.key_width, D, bias=False)
        self.at_answer = nn.Parameter(torch.zeros(D))
        self.key_scale = nn.Parameter(torch.tensor(4.0 / config.key_width))
        self.threshold = nn.Parameter(torch.tensor(0.18))
        self.norm, self.from_x, self.from_word = nn.LayerNorm(D), nn.Linear(D, W), nn.Linear(D, W)
        self.position = nn.Embedding(_MAX_SEGMENT_TOKENS + 1, W)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                W, config.encoder_heads, 2 * W, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.encoder_layers)
        )
        self.code_in = nn.Sequential(nn.LayerNorm(W), nn.Linear(W, C))
        self.importance, self.key_code, self.bag_code, self.value_code = (
            _zero(C, 1),
            _zero(C, D),
            _zero(C, D),
            _zero(C, D),
        )
        self.bag_word, self.value_word = _identity(D), _identity(D)
        self.log_bag = nn.Parameter(torch.tensor(math.log(25.0)))  # the residual stream's norm is about 150 here
        self.log_value = nn.Parameter(torch.tensor(math.log(4.0)))
        distance = torch.arange(-config.reach, config.reach + 1).abs().float()
        self.near = nn.Parameter(torch.exp(-distance / 4) * (distance > 0))
        R = config.static_rank
        scales = (D**-0.5, R**-0.5, D**-0.5, 0.0)
        shapes = ((D, R), (R, D), (D, R), (R, D))
        self.static_parts = nn.ParameterList(
            nn.Parameter(torch.randn(shape) * scale) for shape, scale in zip(shapes, scales, strict=True)
        )

    @property
    def static(self) -> Factors | None:
        return Factors(*self.static_parts)

    def words(self, llm: FrozenLLM, ids: Tensor) -> Tensor:
        """u_w of each token id: unit vectors (..., D) that raise the word's own logit."""
        rows = llm.embeddings[ids.to(llm.device)].to(self.word_map.device).float()
        return normalize((rows - self.word_mean) @ self.word_map, dim=-1)

    def latents(self, segments: Segments, words: Tensor) -> TokenLatents:
        """Everything up to the last linear map, for S segments of T tokens; `words` (S, T, D) are their u_w."""
        h = self.from_x(self.norm(segments.x)) + self.from_word(words * math.sqrt(self.config.width))
        h = h + self.position(torch.arange(h.shape[1], device=h.device))
        for layer in self.encoder:
            h = layer(h, src_key_padding_mask=~segments.mask)
        code = self.code_in(h)
        importance = self.importance(code)[..., 0].float().clamp(-5, 5).exp()
        weight = self.rarity[segments.ids] * importance * segments.mask
        return TokenLatents(self.key_in(segments.x - self.x_mean), code, weight)

    def neurons(self, latents: TokenLatents, words: Tensor, is_neuron: Tensor) -> tuple[Tensor, Tensor]:
        """The last linear map: keys `up` (S, D, T + 1) and values `down` (S, T + 1, D), the bag first.

        `is_neuron` (S, T) says which tokens get a neuron; the others are zero.
        """
        key, code, weight = latents.key, latents.code, latents.weight
        up = self.key_out(key).float() * self.key_scale + 0.1 * self.key_code(code).float()
        up = (up - 4 * self.threshold * self.const) * is_neuron[..., None]
        unit = (weight / (weight.square().sum(1, keepdim=True).sqrt() + 1e-6))[..., None]
        bag = (unit * (self.bag_word(words).float() + 0.3 * self.bag_code(code).float())).sum(1) * self.log_bag.exp()
        T, reach = words.shape[1], self.config.reach
        gap = torch.arange(T, device=words.device)
        gap = gap[None] - gap[:, None]
        band = self.near[gap.clamp(-reach, reach) + reach] * (gap.abs() <= reach)
        down = band @ (weight[..., None] * self.value_word(words).float()) * self.log_value.exp()
        down = (down + 3 * self.value_code(code).float()) * is_neuron[..., None]
        at_answer = self.at_answer.expand(len(up), 1, -1)
        return torch.cat([at_answer, up], 1).mT, torch.cat([bag[:, None], down], 1)

    def is_neuron(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Which tokens are rare enough to get a neuron."""
        return mask & (self.rarity[ids] >= self.config.min_rarity)

    def tokenise(self, llm: FrozenLLM, passage: PassageInput) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of title and sentences, and the token span of each sentence (empty past `max_tokens`)."""
        tokenizer, limit = llm.tokenizer, self.config.max_tokens
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = [] if start is None else [start]
        if passage.title:
            ids += llm.prompt_ids(f"{passage.title}.", is_start=False)[: limit // 2]
        spans = []
        for first, last in passage.spans:
            sentence = llm.prompt_ids(" " + passage.text[first:last], is_start=False)
            sentence = sentence[: max(0, min(limit - len(ids), _MAX_SEGMENT_TOKENS))]
            spans.append((len(ids), len(ids) + len(sentence)))
            ids += sentence
        return ids, spans

    @torch.no_grad()
    def encode(self, llm: FrozenLLM, passages: Sequence[PassageInput]) -> list[Latent]:
        tokenised = [self.tokenise(llm, passage) for passage in passages]
        _, states = llm.states(pad_ids([ids for ids, _ in tokenised]), self.config.layer)
        device = self.const.device
        pieces = [
            (states[row, first:last], torch.tensor(ids[first:last], dtype=torch.long))
            for row, (ids, spans) in enumerate(tokenised)
            for first, last in spans
        ]
        segments = pad_segments([x for x, _ in pieces], [ids for _, ids in pieces], device)
        latents = self.latents(segments, self.words(llm, segments.ids))
        out, index = [], 0
        for _, spans in tokenised:
            lengths = [last - first for first, last in spans]
            rows = [(index + row, length) for row, length in enumerate(lengths)]
            index += len(spans)
            parts = {
                "key": torch.cat([latents.key[row, :length] for row, length in rows]).cpu(),
                "code": torch.cat([latents.code[row, :length] for row, length in rows]).cpu(),
                "weight": torch.cat([latents.weight[row, :length] for row, length in rows])[:, None].cpu(),
                "ids": torch.cat([segments.ids[row, :length] for row, length in rows]).to(torch.int32).cpu(),
                "lengths": torch.tensor(lengths, dtype=torch.int32),
            }
            is_neuron = self.rarity.cpu()[parts["ids"].long()] >= self.config.min_rarity
            pieces_of = torch.split(is_neuron, lengths)
            ranks = tuple(int(part.sum()) + (len(part) > 0) for part in pieces_of)
            out.append(Latent(parts, ranks))
        return out

    @torch.no_grad()
    def materialise(self, llm: FrozenLLM, latents: Sequence[Latent]) -> list[Expert]:
        device = self.const.device

        def split(name: str) -> list[Tensor]:
            return [
                piece.to(device)
                for latent in latents
                for piece in torch.split(latent.tensors[name], latent.tensors["lengths"].tolist())
            ]

        ids = pad_sequence([piece.long() for piece in split("ids")], batch_first=True)
        lengths = torch.cat([latent.tensors["lengths"] for latent in latents]).to(device)
        mask = torch.arange(ids.shape[1], device=device)[None] < lengths[:, None]
        parts = [pad_sequence([p.float() for p in split(name)], batch_first=True) for name in ("key", "code", "weight")]
        is_neuron = self.is_neuron(ids, mask)
        batch = TokenLatents(parts[0], parts[1], parts[2][..., 0])
        up, down = self.neurons(batch, self.words(llm, ids), is_neuron)
        kept = torch.cat([lengths[:, None] > 0, is_neuron], 1)  # the bag of an empty segment goes, too
        experts, index = [], 0
        for latent in latents:
            rows = range(index, index + len(latent.tensors["lengths"]))
            index += len(rows)
            tensors = {
                "up": torch.cat([up[row][:, kept[row]] for row in rows], 1).cpu().contiguous(),
                "down": torch.cat([down[row][kept[row]] for row in rows], 0).cpu().contiguous(),
            }
            experts.append(Expert("neurons", tensors, tuple(int(kept[row].sum()) for row in rows)))
        return experts


def pad_segments(states: Sequence[Tensor], ids: Sequence[Tensor], device: torch.device) -> Segments:
    """Segments side by side: states (T, D) and ids (T,) of each, padded on the right."""
    lengths = torch.tensor([len(piece) for piece in ids], device=device)
    padded_ids = pad_sequence(list(ids), batch_first=True).to(device)
    mask = torch.arange(padded_ids.shape[1], device=device)[None] < lengths[:, None]
    return Segments(pad_sequence(list(states), batch_first=True).to(device).float(), padded_ids, mask)
