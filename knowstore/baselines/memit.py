"""MEMIT (Meng et al., 2023): facts written into the FFNs of several layers in closed form.

Symbols: F facts, D model width, d inner width of the FFN, layers l = l_1 .. L.

    k_l    (d,)  the input of the last linear map W_l (D, d) of the FFN at the subject's last token, mean over contexts
    z      (D,)  the output of block L there that makes the LLM write the target: h_L + delta, delta by gradient descent
    r_l    (D,)  (z - h_L) / (L - l + 1), h_L being what the layers below have already changed it to
    C_l    (d, d) E[k k^T] over usual text

    W_l <- W_l + R_l K_l^T (lambda C_l + K_l K_l^T)^-1           K_l (d, F), R_l (D, F)

which minimises lambda tr(X C_l X^T) + |X K_l - R_l|^2 over X (D, d).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from knowstore._loaded import OnProgress
from knowstore.baselines.edits import Edit, Edited, TaughtFact, Teach
from knowstore.baselines.sequences import TokenRow, essence_row, fact_sequence, logits_of, row_losses
from knowstore.baselines.statistics import CorpusSample, key_moments
from knowstore.baselines.weights import down_projection, hooked, inputs_of, restoring, run_through
from knowstore.errors import ConfigError
from knowstore.experts import FrozenLLM
from knowstore.experts.llm import blocks, pad_ids

_FLOAT32_BYTES = 4
_WORDS_OF_CONTEXT = 8


@dataclass(frozen=True)
class MemitSettings:
    """`layers` are 0-based blocks; `weight_of_usual` is lambda / d, the paper's 15,000 for GPT-J's d of 16,384;
    `steps` of Adam at `learning_rate` find delta, whose norm stays under `max_growth` times that of h_L, with
    `kl_weight` on keeping what the LLM says of "SUBJECT is a" and `decay` on |delta|^2 / |h_L|^2; `n_contexts` texts
    stand before the fact in turn, the first of them empty; `enough_loss` ends the descent, in nats a token."""

    layers: tuple[int, ...] = (4, 5, 6, 7, 8)
    weight_of_usual: float = 15_000 / 16_384
    steps: int = 20
    learning_rate: float = 1.0
    max_growth: float = 4.0
    kl_weight: float = 0.0625
    decay: float = 0.5
    n_contexts: int = 2
    enough_loss: float = 0.1


def update_factor(K: Tensor, C: Tensor, weight: float) -> Tensor:
    """K^T (weight C + K K^T)^-1, (F, d), which residuals (D, F) multiply from the left to give a layer's update.

    Args:
        K: keys (d, F).
        C: second moment of usual keys (d, d), positive definite.
        weight: lambda, how much usual keys count.
    """
    keys = K.double()
    system = weight * C.double() + keys @ keys.T  # symmetric, so that (A^-1 K)^T = K^T A^-1
    factor: Tensor = torch.linalg.solve(system, keys).T.to(K.dtype)
    return factor


class Memit:
    """MEMIT behind the baselines' interface; the facts of one edit are written together, edits one after another."""

    name = "memit"

    def __init__(self, sample: CorpusSample, settings: MemitSettings | None = None) -> None:
        self.sample, self.settings = sample, settings or MemitSettings()
        self._moments: dict[int, Tensor] = {}
        texts = [" ".join(text.split()[:_WORDS_OF_CONTEXT]) for text in sample.texts]
        self._contexts = ["", *(f"{text}.\n" for text in texts)][: self.settings.n_contexts]

    def prepare(self, llm: FrozenLLM, on_progress: OnProgress | None = None) -> None:
        """Estimate C of each layer, or read it from the cache.

        Raises:
            ConfigError: no corpus to estimate it from.
            MountError: a layer that the LLM has not, or whose FFN has no last linear map.
        """
        if not self.sample.texts:
            raise ConfigError(
                "MEMIT needs a corpus, to know which FFN keys are usual",
                kept="nothing was measured",
                fix="give passages {title, text} with --corpus",
            )
        self._moments = key_moments(llm, self.settings.layers, self.sample, on_progress)

    @contextmanager
    def teaching(self, llm: FrozenLLM) -> Iterator[Teach]:
        """Write the edits' facts into the weights; these are put back after the block."""
        projections = {layer: down_projection(llm.model, layer) for layer in self.settings.layers}
        kept = 0

        def teach(edits: Sequence[Edit]) -> Edited:
            nonlocal kept
            started = time.perf_counter()
            kept += sum(self._write(llm, projections, edit.facts) for edit in edits)
            return Edited(time.perf_counter() - started, kept)

        with restoring([*(projection.weight for projection in projections.values())]):
            yield teach

    def _write(self, llm: FrozenLLM, projections: dict[int, nn.Linear], facts: Sequence[TaughtFact]) -> int:
        """Write facts into the weights; returns the bytes of the change as R_l and the factor that it multiplies."""
        if not facts:
            return 0
        rows = [[fact_sequence(llm, fact, before=before) for before in self._contexts] for fact in facts]
        bare = [some[0] for some in rows]
        top, n_bytes = self.settings.layers[-1], 0
        z = self._wanted(llm, rows, [essence_row(llm, fact) for fact in facts])  # (F, D)
        for layer, projection in projections.items():
            n_left = sum(layer <= other <= top for other in projections)
            residuals = (z - outputs_at_subjects(llm, bare, top)) / n_left  # (F, D)
            factor = update_factor(
                _keys(llm, rows, layer).T,
                self._moments[layer],
                self.settings.weight_of_usual * projection.in_features,
            )
            with torch.no_grad():
                projection.weight += (residuals.T @ factor).to(projection.weight.dtype)
            n_bytes += _FLOAT32_BYTES * (residuals.numel() + factor.numel())
        return n_bytes

    def _wanted(self, llm: FrozenLLM, rows: Sequence[Sequence[TokenRow]], essences: Sequence[TokenRow]) -> Tensor:
        """z (F, D): the outputs of the top layer at the subjects that make the LLM write the targets."""
        settings, top = self.settings, self.settings.layers[-1]
        h = outputs_at_subjects(llm, [some[0] for some in rows], top).float()
        n_facts, n_contexts = len(rows), len(rows[0])
        flat = [*(row for some in rows for row in some), *essences]
        owners = [*(fact for fact in range(n_facts) for _ in range(n_contexts)), *range(n_facts)]
        delta = torch.zeros_like(h, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=settings.learning_rate)
        usual: Tensor | None = None
        norms = h.norm(dim=-1, keepdim=True)
        for _ in range(settings.steps):
            optimizer.zero_grad()
            with _adding(llm, top, flat, delta, owners):
                logits, right = logits_of(llm, flat)
            losses = row_losses(logits[:-n_facts], right[:-n_facts], flat[:-n_facts])
            spoken = logits[-n_facts:].log_softmax(-1)
            usual = spoken.detach() if usual is None else usual
            kl = kl_div(spoken, usual, log_target=True, reduction="sum")
            if float(losses.detach().max()) < settings.enough_loss:
                break
            loss = losses.sum() / n_contexts + settings.kl_weight * kl
            loss = loss + settings.decay * (delta.square().sum(-1) / norms[:, 0].square()).sum()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                delta *= (settings.max_growth * norms / delta.norm(dim=-1, keepdim=True).clamp(min=1e-9)).clamp(max=1.0)
        return h + delta.detach()


def outputs_at_subjects(llm: FrozenLLM, rows: Sequence[TokenRow], layer: int) -> Tensor:
    """(F, D): what the 0-based block puts out at the subject of each row."""
    seen: list[Tensor] = []

    def take(_args: Any, output: Any) -> None:
        seen.append(_states(output))

    with hooked([blocks(llm.model)[layer]], [take]):
        run_through(llm, pad_ids([row.ids for row in rows]), layer)
    return _at_subjects(seen[0], rows)


def _keys(llm: FrozenLLM, rows: Sequence[Sequence[TokenRow]], layer: int) -> Tensor:
    """(F, d): the input of the last linear map of a block's FFN at the subject of each fact, mean over the contexts."""
    flat = [row for some in rows for row in some]
    with inputs_of([down_projection(llm.model, layer)]) as seen:
        run_through(llm, pad_ids([row.ids for row in flat]), layer)
    return _at_subjects(seen[0][0], flat).reshape(len(rows), len(rows[0]), -1).mean(1).float()


def _at_subjects(states: Tensor, rows: Sequence[TokenRow]) -> Tensor:
    return states[torch.arange(len(rows)), [row.subject for row in rows]].float()


def _states(output: Any) -> Tensor:
    """The hidden states in what a decoder block gives, alone or first of a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


@contextmanager
def _adding(
    llm: FrozenLLM, layer: int, rows: Sequence[TokenRow], delta: Tensor, owners: Sequence[int]
) -> Iterator[None]:
    """Add delta (F, D) of each row's owner to what the block puts out at the row's subject."""
    where = torch.arange(len(rows)), torch.tensor([row.subject for row in rows])

    def add(_args: Any, output: Any) -> Any:
        states = _states(output)
        changed = states.index_put(where, delta[list(owners)].to(states.dtype), accumulate=True)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with hooked([blocks(llm.model)[layer]], [add]):
        yield
