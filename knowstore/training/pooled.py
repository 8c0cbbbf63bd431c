"""Training of the `pooled` hypernetwork, the paper's, by Eq. 5 alone: what every other design is measured against."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from knowstore.experts.expert import Experts, Factors
from knowstore.experts.llm import FrozenLLM, pad_ids
from knowstore.experts.mount import mount
from knowstore.experts.pooled import PooledHypernetwork
from knowstore.training.data import TrainingData
from knowstore.training.run import (
    N_OPENING,
    Batch,
    Given,
    Losses,
    PreparedQuestion,
    Run,
    plain_attention,
    window_of,
    written_question,
)


class PooledRun(Run):
    """Of the `pooled` hypernetwork; it has no static part, so that its experts teach the format as well.

    Args:
        network, llm, data: what is trained, for what, on what.
        n_per_passage: most questions of a passage.
    """

    network: PooledHypernetwork

    def __init__(self, network: PooledHypernetwork, llm: FrozenLLM, data: TrainingData, n_per_passage: int) -> None:
        self.network, self.llm = network, llm
        self.means = network.mean_embeddings(llm, data.passages)  # (N, D)
        self.lengths = [1] * len(data.passages)  # a mean is as long as any other
        self.prepare(data, n_per_passage, lambda row: written_question(llm, row))

    def losses(self, batch: Batch, draw: random.Random, *, is_answering: bool) -> Losses:
        if not is_answering:
            return Losses(None)
        own = [position for position, _ in batch.rows]
        experts = self._experts(batch, own)
        questions = [self.questions[question] for _, question in batch.rows]
        ids = pad_ids([question.ids for question in questions]).to(self.llm.device)
        with plain_attention(self.llm):
            with mount(self.llm.model, experts, self.network.config.layer):
                steps = self.answer_steps(questions, ids)
            beside = self.others(batch, 1)
            other = [beside[position][0] for position in own]
            signals = self.further(
                batch, questions, ids, steps,
                lambda: self._experts(batch, other), lambda: self._windows(batch, draw),
            )  # fmt: skip
        return Losses(steps.nats(), signals=signals)

    def static_loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError("the pooled hypernetwork has no static expert")

    @torch.no_grad()
    def validated(self, batch: Batch, *, is_own: bool) -> Given:
        chosen = [position if is_own else (position + 1) % len(batch.passages) for position, _ in batch.rows]
        return Given(self._experts(batch, chosen), ("",) * len(chosen))

    def _windows(self, batch: Batch, draw: random.Random) -> tuple[list[PreparedQuestion], Experts]:
        """For each question a stretch of its passage's text, and the passage's expert."""
        chosen, windows = list[int](), list[PreparedQuestion]()
        for position, _ in batch.rows:
            ids = self.llm.prompt_ids(self.data.passages[batch.passages[position]].text, is_start=False)
            if len(ids) > N_OPENING:
                chosen.append(position)
                windows.append(window_of(self.llm, ids, draw))
        return windows, self._experts(batch, chosen)

    def _experts(self, batch: Batch, chosen: list[int]) -> Experts:
        """Those of the passages at positions `chosen` of the batch, one for each question."""
        llm = self.llm
        four = self.network.factors(self.network.latents(self.means[batch.passages]))
        each = (four.up1, four.up2, four.dw1, four.dw2)
        return Experts(
            factors=Factors(*(part[chosen][:, None].to(llm.device, llm.dtype) for part in each)),
            factor_weights=torch.ones(len(chosen), 1, device=llm.device, dtype=llm.dtype),
            max_norm=self.network.config.max_norm,
        )
