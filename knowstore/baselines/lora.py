"""FT-LoRA: fine-tuning of low-rank updates (Hu et al., 2021) on an edit's passage and facts, by peft.

    W x + (alpha / r) B A x        A (r, in) random, B (out, r) zero at first

The adapter starts anew with each block of teaching and is trained on its edits in turn: within an edit the steps
alternate between its facts and its passage, and end early once the facts' loss is small.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from knowstore._loaded import OnProgress
from knowstore.baselines.edits import Edit, Edited, Teach
from knowstore.baselines.sequences import fact_sequence, passage_sequence, writing_loss
from knowstore.errors import ConfigError
from knowstore.experts import FrozenLLM


@dataclass(frozen=True)
class LoraSettings:
    """`rank` r and `alpha` as above, on the query and value projections (peft's choice for the architecture);
    `steps` of Adam at `learning_rate` an edit, fewer once the facts' loss is under `enough_loss` nats."""

    rank: int = 8
    alpha: int = 32
    steps: int = 30
    learning_rate: float = 2e-3
    enough_loss: float = 0.02
    seed: int = 0


@dataclass(frozen=True)
class Lora:
    """FT-LoRA behind the baselines' interface."""

    settings: LoraSettings = field(default_factory=LoraSettings)
    name: str = "lora"

    def prepare(self, llm: FrozenLLM, on_progress: OnProgress | None = None) -> None:
        """See that peft is there.

        Raises:
            ConfigError: it is not.
        """
        _peft()

    @contextmanager
    def teaching(self, llm: FrozenLLM) -> Iterator[Teach]:
        """Train an adapter on the edits in turn; it is taken off after the block."""
        peft = _peft()
        config = peft.LoraConfig(r=self.settings.rank, lora_alpha=self.settings.alpha, lora_dropout=0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            tuner = peft.LoraModel(llm.model, config, "default")
        try:
            adapter = [parameter for parameter in llm.model.parameters() if parameter.requires_grad]
            kept = sum(parameter.numel() * parameter.element_size() for parameter in adapter)

            def teach(edits: Sequence[Edit]) -> Edited:
                started = time.perf_counter()
                for parameter in adapter:
                    parameter.requires_grad_(True)
                for edit in edits:
                    self._train(llm, adapter, edit)
                for parameter in adapter:
                    parameter.requires_grad_(False)
                return Edited(time.perf_counter() - started, kept)

            yield teach
        finally:
            tuner.unload()

    def _train(self, llm: FrozenLLM, adapter: list[torch.nn.Parameter], edit: Edit) -> None:
        optimizer = torch.optim.Adam(adapter, lr=self.settings.learning_rate)
        facts = [fact_sequence(llm, fact) for fact in edit.facts]
        texts = [batch for batch in (facts, [passage_sequence(llm, edit)]) if batch]
        for step in range(self.settings.steps):
            batch = texts[step % len(texts)]
            optimizer.zero_grad()
            loss = writing_loss(llm, batch)
            if batch is facts and float(loss.detach()) < self.settings.enough_loss:
                break
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "peft is not installed", kept="nothing was measured", fix="pip install 'knowstore[baselines]'"
        ) from error
    return peft
