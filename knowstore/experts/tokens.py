"""The `tokens` hypernetwork: one neuron for each token of a passage, which fires when that token is to be written.

A passage is read once by a small bidirectional encoder, trained from a published one. Each token t of a sentence
(segment) gets a neuron beside the FFN of the mount layer of the frozen LLM:

    key_t     fires where the LLM is about to write t: at the end of a question that t answers, or behind t's
              left neighbour when the answer has come that far; a linear map of t's code, of its word and of the
              word before it, in the space where the LLM's states are white
    value_t   t's word along u_t, which raises the LLM's own logit of t when it is added to the residual stream,
              and a linear map of t's code

The state of the frozen LLM at the end of a question knows little of what was asked, so the hypernetwork also has
*query experts*: one small expert beside the FFN of each of some blocks below the mount layer, stored once, the same for
every question and every passage. They hold no knowledge; they make the state a better query.

An inner product with a constant direction (`const`, about 1 for every state) stands in for the bias that Eq. 2 lacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize, pad

from knowstore.encoders import BaseEncoder
from knowstore.experts.expert import Expert, Factors, QueryExperts
from knowstore.experts.hypernetwork import Hypernetwork, HypernetworkConfig, Latent, PassageInput, normal_parameters
from knowstore.experts.llm import FrozenLLM, pad_ids

_EMBEDDINGS = "encoder.embeddings."
_TEMPERATURE = 8.0  # of inner products of white states with keys, so that keys start at the scale of their maps


@dataclass(frozen=True)
class TokensConfig(HypernetworkConfig):
    """Sizes of the `tokens` hypernetwork.

    `encoder_width` is the encoder's E, `base` the reference of the published encoder that it was trained from and
    `base_digest` what identifies that;
    `code_width` is what of a token's state reaches its neuron; `static_rank` is the rank of the static expert; query
    experts of `query_rank` neurons stand beside the FFNs from block `query_from` up to below the mount layer;
    a passage is read up to `max_tokens` of the LLM's tokens.
    """

    kind: ClassVar[str] = "tokens"
    encoder_width: int = 384
    base: str = "default"
    base_digest: str = ""
    code_width: int = 160
    static_rank: int = 48
    query_from: int = 2
    query_rank: int = 64
    max_tokens: int = 320

    @property
    def query_layers(self) -> range:
        """The 0-based blocks that have a query expert."""
        return range(min(self.query_from, self.layer), self.layer)


@dataclass(frozen=True)
class Tokenised:
    """A passage in the LLM's tokens: `ids` (T,) of title and sentences, `spans` the tokens of each sentence (empty
    past the limit), `pieces` (T,) the position of each token's end among the encoder's `piece_ids`, and `places` the
    characters of each sentence's token in the passage's text."""

    ids: list[int]
    spans: list[tuple[int, int]]
    piece_ids: list[int]
    pieces: list[int]
    places: list[tuple[int, int]]


@dataclass(frozen=True)
class Tokens:
    """B passages padded to T tokens: `code` (B, T, C), `ids` and `before` (B, T), the word left of each token or -1,
    and `mask` (B, T), true for the tokens that get a neuron."""

    code: Tensor
    ids: Tensor
    before: Tensor
    mask: Tensor


class TokensHypernetwork(Hypernetwork):
    """See the module's docstring.

    Args:
        config: its sizes.
        base: the published encoder; its layers become the hypernetwork's own and are trained, its embeddings
            stay as they are.
    """

    config: TokensConfig
    x_mean: Tensor
    whitener: Tensor
    const: Tensor
    word_mean: Tensor
    word_map: Tensor

    def __init__(self, config: TokensConfig, base: BaseEncoder) -> None:
        super().__init__()
        self.config, self.base = config, base
        D, C = config.width, config.code_width
        for name, shape in (
            ("x_mean", (D,)),
            ("whitener", (D, D)),
            ("const", (D,)),
            ("word_mean", (D,)),
            ("word_map", (D, D)),
        ):
            self.register_buffer(name, torch.zeros(shape))
        self.encoder = base.model
        self.code = nn.Sequential(nn.LayerNorm(config.encoder_width), nn.Linear(config.encoder_width, C))
        self.key_code, self.key_word, self.key_before = nn.Linear(C, D), _zero(D, D), _zero(D, D)
        self.value_code, self.value_word = nn.Linear(C, D), nn.Linear(D, D, bias=False)
        for part in (self.value_code.weight, self.value_code.bias):
            nn.init.zeros_(part)
        nn.init.eye_(self.value_word.weight)
        self.no_token = nn.Parameter(torch.zeros(D))
        self.key_bias, self.threshold = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))
        self.log_value = nn.Parameter(torch.tensor(math.log(12.0)))  # the residual stream's norm is about 150 here
        R = config.static_rank
        scales = (D**-0.5, R**-0.5, D**-0.5, 0.0)
        self.static_parts = normal_parameters(zip(((D, R), (R, D), (D, R), (R, D)), scales, strict=True))
        n, R = len(config.query_layers), config.query_rank
        self.query_up = normal_parameters(((D, R), D**-0.5) for _ in range(n))
        self.query_down = normal_parameters(((R, D), 0.0) for _ in range(n))

    def set_trainable(self) -> None:
        """Gradients for everything but the published embeddings."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(_EMBEDDINGS))

    @property
    def static(self) -> Factors | None:
        return Factors(*self.static_parts)

    @property
    def query(self) -> QueryExperts | None:
        if not self.config.query_layers:
            return None
        return QueryExperts(tuple(self.config.query_layers), tuple(self.query_up), tuple(self.query_down))

    # from a passage to codes

    def tokenise(self, llm: FrozenLLM, passage: PassageInput) -> Tokenised:
        """Token ids of title and sentences, and where each token ends among the encoder's word pieces."""
        text, ids, ends, spans, places = self._read(llm, passage)
        encoded = self.base.tokenizer(
            text.encode("utf-8", "replace").decode(), truncation=True, max_length=self.base.max_tokens,
            return_offsets_mapping=True, split_special_tokens=True,
        )  # fmt: skip
        return Tokenised(ids, spans, encoded["input_ids"], _pieces(ends, encoded["offset_mapping"]), places)

    def neuron_spans(self, llm: FrozenLLM, passage: PassageInput) -> list[tuple[int, int]]:
        return self._read(llm, passage)[-1]

    def _read(
        self, llm: FrozenLLM, passage: PassageInput
    ) -> tuple[str, list[int], list[int], list[tuple[int, int]], list[tuple[int, int]]]:
        """What is read of a passage, its tokens and where each ends in it, and `spans` and `places`."""
        limit = self.config.max_tokens
        head = f"{passage.title}." if passage.title else ""
        ids, ends = llm.prompt_ids_and_ends(head)
        ids, ends = ids[: limit // 2], ends[: limit // 2]
        spans: list[tuple[int, int]] = []
        places: list[tuple[int, int]] = []
        text = head
        for first, last in passage.spans:
            sentence = " " + passage.text[first:last]
            new, new_ends = llm.prompt_ids_and_ends(sentence)
            new = new[: max(0, limit - len(ids))]
            spans.append((len(ids), len(ids) + len(new)))
            ids += new
            ends += [len(text) + end for end in new_ends[: len(new)]]
            places += _places(sentence, first - 1, new_ends[: len(new)])
            text += sentence
        return text, ids, ends, spans, places

    def codes(self, passages: Sequence[Tokenised]) -> Tensor:
        """What the encoder makes of each token in its passage: (B, T, C)."""
        device = self.const.device
        piece_ids = pad_ids([one.piece_ids for one in passages], value=self.base.tokenizer.pad_token_id).to(device)
        mask = pad_ids([[1] * len(one.piece_ids) for one in passages]).to(device)
        states = self.base.states(piece_ids, mask)
        index = pad_ids([one.pieces for one in passages]).to(device)
        codes: Tensor = self.code(states.gather(1, index[..., None].expand(-1, -1, states.shape[-1])))
        return codes

    def tokens(self, passages: Sequence[Tokenised], codes: Tensor) -> Tokens:
        """Codes with the words that they belong to."""
        ids = pad_ids([one.ids for one in passages]).to(codes.device)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, one in enumerate(passages):
            for first, last in one.spans:
                mask[row, first:last] = True
        return Tokens(codes, ids, pad(ids, (1, 0), value=-1)[:, :-1], mask.to(codes.device))

    # from codes to neurons: linear in the code

    def keys(self, llm: FrozenLLM, tokens: Tokens) -> Tensor:
        """What the white state of the LLM is compared with: (B, T, D)."""
        both = torch.stack([tokens.ids, tokens.before.clamp(min=0)])
        words, places = torch.unique(both, return_inverse=True)  # a text repeats many of its words
        embedded = layer_norm(self._embedded(llm, words), (self.config.width,))
        word, before = self.key_word(embedded)[places[0]], self.key_before(embedded)[places[1]]
        keys: Tensor = self.key_code(tokens.code) + word + before * (tokens.before >= 0)[..., None]
        return keys.float()  # out of autocast

    def values(self, llm: FrozenLLM, tokens: Tokens) -> Tensor:
        """What neurons add to the residual stream: (B, T, D), zero where `tokens.mask` is."""
        words, places = torch.unique(tokens.ids, return_inverse=True)
        directions = normalize((self._embedded(llm, words) - self.word_mean) @ self.word_map, dim=-1)
        values = self.value_word(directions).float()[places] + self.value_code(tokens.code).float()
        scaled: Tensor = values * tokens.mask[..., None] * self.log_value.exp()
        return scaled

    def _embedded(self, llm: FrozenLLM, ids: Tensor) -> Tensor:
        return llm.embeddings[ids.to(llm.device)].to(self.const.device).float()

    def scores(self, x: Tensor, keys: Tensor) -> Tensor:
        """Logits (B, I, T) that the LLM in states x (B, I, D) writes each of T tokens; 0 is none of them."""
        white = (x.float() - self.x_mean) @ self.whitener
        none = white @ self.no_token / _TEMPERATURE + self.key_bias
        return white @ keys.mT / _TEMPERATURE - none[..., None]

    def neurons(self, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`up` (B, D, T) and `down` (B, T, D): x up is what `scores` gives, less the threshold."""
        up = (((keys - self.no_token) / _TEMPERATURE) @ self.whitener.T).float()
        with torch.autocast(up.device.type, enabled=False):
            offset = (up @ self.x_mean)[..., None] + self.key_bias + self.threshold
        return ((up - offset * self.const) * mask[..., None]).mT, values

    @torch.no_grad()
    def encode(self, llm: FrozenLLM, passages: Sequence[PassageInput]) -> list[Latent]:
        tokenised = [self.tokenise(llm, passage) for passage in passages]
        with torch.autocast(self.const.device.type, llm.dtype, enabled=llm.dtype == torch.bfloat16):
            codes = self.codes(tokenised).float().cpu()
        out = []
        for row, one in enumerate(tokenised):
            first = one.spans[0][0] if one.spans else 0
            lengths = [last - start for start, last in one.spans]
            parts = {
                "code": codes[row, first : len(one.ids)].contiguous(),
                "ids": torch.tensor(one.ids[first:], dtype=torch.int32),
                "before": torch.tensor([one.ids[first - 1] if first else -1], dtype=torch.int32),
            }
            out.append(Latent(parts, tuple(lengths)))
        return out

    @torch.no_grad()
    def materialise(self, llm: FrozenLLM, latents: Sequence[Latent]) -> list[Expert]:
        device = self.const.device
        each = [latent.tensors for latent in latents]
        ids = torch.cat([one["ids"] for one in each]).long().to(device)
        before = torch.cat([_before(one) for one in each]).long().to(device)
        code = torch.cat([one["code"].float() for one in each]).to(device)
        is_neuron = torch.ones(1, len(ids), dtype=torch.bool, device=device)
        tokens = Tokens(code[None], ids[None], before[None], is_neuron)  # of all passages in a row
        with torch.autocast(device.type, llm.dtype, enabled=llm.dtype == torch.bfloat16):  # as in training
            up, down = self.neurons(self.keys(llm, tokens), self.values(llm, tokens), is_neuron)
        experts, first = [], 0
        for latent in latents:
            ours = slice(first, first := first + len(latent.tensors["ids"]))
            tensors = {"up": up[0, :, ours].cpu().contiguous(), "down": down[0, ours].cpu().contiguous()}
            experts.append(Expert("neurons", tensors, latent.segment_ranks))
        return experts

    def part(self, latent: Latent, neurons: Sequence[int]) -> Latent:
        chosen = torch.tensor(neurons, dtype=torch.long)
        parts = latent.tensors | {"before": _before(latent.tensors)}
        return Latent({name: part[chosen] for name, part in parts.items()}, (len(neurons),))

    def own_tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in super().own_tensors().items() if not name.startswith(_EMBEDDINGS)}


def _zero(inner: int, outer: int) -> nn.Linear:
    linear = nn.Linear(inner, outer, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def _before(latent: Mapping[str, Tensor]) -> Tensor:
    """The word left of each token of a latent, which has them all or, of a whole passage, the first's alone."""
    return torch.cat([latent["before"], latent["ids"]])[: len(latent["ids"])]


def _places(sentence: str, shift: int, ends: Sequence[int]) -> list[tuple[int, int]]:
    """The characters of each token of a sentence, by where it ends, moved by `shift`.

    A token that is a blank alone, as before a number, stands for what the next one does; one that is the rest of
    a character's bytes for what the one before does.
    """
    places: list[tuple[int, int]] = []
    for start, end in pairwise((0, *ends)):
        places.append((start, end) if end > start or not places else places[-1])
    for position in range(len(places) - 2, -1, -1):
        start, end = places[position]
        if not sentence[start:end].strip():
            places[position] = (start, places[position + 1][1])
    return [(max(start, 1) + shift, max(end, 1) + shift) for start, end in places]


def _pieces(ends: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """For each token, by where it ends in the text, the word piece that holds its last letter (or the nearest left)."""
    pieces, position = [], 0
    for end in ends:
        while position + 1 < len(offsets) and offsets[position + 1][0] < end and offsets[position + 1][1]:
            position += 1
        pieces.append(position)
    return pieces
