"""MEND and MALMEN behind the baselines' interface: the editor network is trained once on edits of its own, then every
edit is a gradient, one pass through the network, and the method's rule.

    loss = edit_weight * (- log P(target | fact) - log P(target | paraphrase)) + KL(before || after | neighbourhood)

of the changed LLM, with gradients through the change to the network (Mitchell et al., 2022, Eq. 4 and 5). The last
linear map of the FFN of the top `n_layers` blocks is edited.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.nn.utils import clip_grad_norm_

from knowstore._loaded import OnProgress
from knowstore.baselines.cache import TensorCache
from knowstore.baselines.editor import EditorShape, GradientEditor, Rule
from knowstore.baselines.edits import Edit, Edited, EditRow, Kind, TaughtFact, Teach
from knowstore.baselines.gradients import GradientFactors, changed_by, gradient_factors
from knowstore.baselines.sequences import TokenRow, fact_sequence, logits_of, writing_loss
from knowstore.baselines.weights import down_projection, restoring
from knowstore.errors import ConfigError
from knowstore.experts import FrozenLLM

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class EditorSettings:
    """`rank` of the network; `steps` of Adam at `learning_rate`, each on `batch` rows that are taught together;
    `n_standard` rows set what the network's input is standardised by."""

    n_layers: int = 3
    rank: int = 64
    steps: int = 500
    batch: int = 1
    learning_rate: float = 1e-3
    edit_weight: float = 1.0
    n_standard: int = 16
    seed: int = 0


@dataclass(frozen=True)
class EditorData:
    """Edits to train on, none of which is evaluated on; where the trained network is kept (None: nowhere), and the
    fingerprint of the LLM that it is for."""

    rows: Sequence[EditRow]
    cache_dir: Path | None = None
    fingerprint: str = ""


class TrainedEditor:
    """A method of the rule `summed` (MEND) or `least_squares` (MALMEN)."""

    def __init__(self, name: str, rule: Rule, data: EditorData, settings: EditorSettings | None = None) -> None:
        self.name, self.rule, self.data, self.settings = name, rule, data, settings or EditorSettings()
        self.losses: list[float] = []
        self._editor: GradientEditor | None = None

    def prepare(self, llm: FrozenLLM, on_progress: OnProgress | None = None) -> None:
        """Train the network, or read it from the cache.

        Raises:
            ConfigError: no edits to train it on.
            MountError: an LLM whose FFNs do not end in a linear map.
        """
        if not self.data.rows:
            raise ConfigError(
                f"{self.name} needs edits to train its network on",
                kept="nothing was measured",
                fix="give an edit set with --train, of other edits than those that are asked",
            )
        maps = self._maps(llm)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            shape = EditorShape(len(maps), maps[0].in_features, maps[0].out_features, self.settings.rank)
            editor = GradientEditor(shape).to(llm.device)
        kept = self._cache().read()
        if kept is None:
            self._train(llm, editor, maps, on_progress)
            self._cache().keep(editor.state_dict())
        else:
            editor.load_state_dict(kept)
        self._editor = editor.requires_grad_(False)

    @contextmanager
    def teaching(self, llm: FrozenLLM) -> Iterator[Teach]:
        """Change the weights by one edit after another; they are put back after the block."""
        if self._editor is None:
            self.prepare(llm)
        assert self._editor is not None
        editor, maps, n_bytes = self._editor, self._maps(llm), 0

        def teach(edits: Sequence[Edit]) -> Edited:
            nonlocal n_bytes
            started = time.perf_counter()
            n_bytes += sum(self._write(llm, editor, maps, edit.facts) for edit in edits)
            return Edited(time.perf_counter() - started, n_bytes)

        with restoring([*(one.weight for one in maps)]):
            yield teach

    def _write(
        self, llm: FrozenLLM, editor: GradientEditor, maps: Sequence[nn.Linear], facts: Sequence[TaughtFact]
    ) -> int:
        """Change the weights so that they know facts; returns the bytes of the gradient's factors."""
        if not facts:
            return 0
        found = gradient_factors(llm, [fact_sequence(llm, fact) for fact in facts], maps)
        with torch.no_grad():
            for one, change in zip(maps, editor.changes(found, self.rule), strict=True):
                one.weight += change.to(one.weight.dtype)
        return sum(_FLOAT32_BYTES * (one.u.numel() + one.delta.numel()) for one in found)

    def _maps(self, llm: FrozenLLM) -> list[nn.Linear]:
        return [down_projection(llm.model, llm.n_layers - 1 - place) for place in range(self.settings.n_layers)]

    def _train(
        self, llm: FrozenLLM, editor: GradientEditor, maps: Sequence[nn.Linear], on_progress: OnProgress | None
    ) -> None:
        settings, rows = self.settings, list(self.data.rows)
        random.Random(settings.seed).shuffle(rows)
        editor.standardise_on([_factors(llm, [row], maps) for row in rows[: settings.n_standard]])
        optimizer = torch.optim.Adam(editor.parameters(), lr=settings.learning_rate)
        for step in range(settings.steps):
            some = [rows[(step * settings.batch + place) % len(rows)] for place in range(settings.batch)]
            optimizer.zero_grad()
            changes = editor.changes(_factors(llm, some, maps), self.rule)
            loss = self._loss(llm, some, maps, changes)
            loss.backward()  # type: ignore[no-untyped-call]
            clip_grad_norm_(editor.parameters(), 1.0)
            optimizer.step()
            self.losses.append(float(loss.detach()))
            if on_progress is not None:
                recent = self.losses[-50:]
                on_progress(f"{self.name}, loss {sum(recent) / len(recent):.2f}", step + 1, settings.steps)

    def _loss(
        self, llm: FrozenLLM, rows: Sequence[EditRow], maps: Sequence[nn.Linear], changes: Sequence[Tensor]
    ) -> Tensor:
        near = _asked(llm, rows, "neighbourhood")
        with torch.no_grad():
            usual = logits_of(llm, near)[0].log_softmax(-1) if near else None
        with changed_by(maps, changes):
            loss = self.settings.edit_weight * writing_loss(
                llm, [*_taught(llm, rows), *_asked(llm, rows, "paraphrase")]
            )
            if usual is not None:
                after = logits_of(llm, near)[0].log_softmax(-1)
                loss = loss + kl_div(after, usual, log_target=True, reduction="batchmean")
        return loss

    def _cache(self) -> TensorCache:
        described = [self.name, self.data.fingerprint, self.settings, *self.data.rows]
        return TensorCache.of(self.data.cache_dir, "editors", described)


def _taught(llm: FrozenLLM, rows: Sequence[EditRow]) -> list[TokenRow]:
    return [fact_sequence(llm, fact) for row in rows for edit in row.edits for fact in edit.facts]


def _asked(llm: FrozenLLM, rows: Sequence[EditRow], kind: Kind) -> list[TokenRow]:
    probes = [probe for row in rows for probe in row.probes if probe.kind == kind]
    return [fact_sequence(llm, TaughtFact(probe.question, "", probe.answers[0])) for probe in probes]


def _factors(llm: FrozenLLM, rows: Sequence[EditRow], maps: Sequence[nn.Linear]) -> list[GradientFactors]:
    return gradient_factors(llm, _taught(llm, rows), maps)
