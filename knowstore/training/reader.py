"""Training of the `reader`: Eq. 5 as passages are served, so that one reader serves `rag` and `hybrid`. A question's
passage stands in the prompt alone or among others, or in a share of the batches all their experts are mounted and one
passage is read. The others are of the same title where there are some, for they are the hardest to tell apart.

A passage's keys and values do not depend on what is trained, which acts from the question on: they are computed once a
batch, without gradients, and shared by all questions of the passage.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache

from knowstore.errors import TrainingError
from knowstore.experts.expert import Experts
from knowstore.experts.generation import max_prompt_tokens
from knowstore.experts.hypernetwork import PassageInput
from knowstore.experts.llm import FrozenLLM, pad_ids
from knowstore.experts.mount import mount
from knowstore.experts.reader import ReaderHypernetwork
from knowstore.prompts import passages_prompt
from knowstore.training.data import TrainingData
from knowstore.training.run import (
    Batch,
    Given,
    Losses,
    Run,
    TokensRun,
    plain_attention,
    written_question,
)
from knowstore.training.signals import AnswerSteps, Teacher

_TOGETHER = (1, 1, 2, 4)  # passages that are served together, drawn from these
_EXPERTS_SHARE = 0.4  # of the batches have experts mounted
_RIGHT_SHARE = 0.75  # of the prompts beside experts of several passages hold the right one
_MAX_READ_TOKENS = 1500  # in one prompt, or fewer where the LLM has no room for them
_MAX_ASKED_TOKENS = 160  # that stand behind it


class ReaderRun(Run):
    """Of the `reader`.

    Args:
        network, llm, data: what is trained, for what, on what.
        n_per_passage: most questions of a passage.
        beside: a run of the hypernetwork whose experts are mounted in a share of the batches, on the same data; None
            trains for prompts alone.

    Raises:
        TrainingError: `beside` has no reranker to weigh its experts.
    """

    network: ReaderHypernetwork

    def __init__(
        self,
        network: ReaderHypernetwork,
        llm: FrozenLLM,
        data: TrainingData,
        n_per_passage: int,
        beside: TokensRun | None = None,
    ) -> None:
        if beside is not None and beside.reranker is None:
            raise TrainingError(
                "there is no reranker to weigh the experts beside the prompt", kept="nothing was trained",
                fix="train with a reranker that needs no vectors, or for prompts alone",
            )  # fmt: skip
        self.network, self.llm, self.beside = network, llm, beside
        self.reranker = None if beside is None else beside.reranker
        self._n_room = min(_MAX_READ_TOKENS, max_prompt_tokens(llm, _MAX_ASKED_TOKENS))
        self.lengths = [len(one.text) // 4 for one in data.passages]  # about as many tokens
        self.prepare(data, n_per_passage, lambda row: written_question(llm, row, is_start=False))
        self.train_on(range(len(data.passages)))

    def train_on(self, passages: Sequence[int]) -> None:
        self._of_title: dict[str, list[int]] = {}
        for passage in passages:
            if title := self.data.passages[passage].title:
                self._of_title.setdefault(title, []).append(passage)

    def losses(self, batch: Batch, draw: random.Random, *, is_answering: bool) -> Losses:
        if not is_answering:
            return Losses(None)
        served = [self._together(batch, position, draw) for position in range(len(batch.passages))]
        read, experts = served, self.network.static_experts(self.llm)
        if self.beside is not None and draw.random() < _EXPERTS_SHARE:
            found = self.beside.served([(question, served[position]) for position, question in batch.rows])
            experts = replace(found, static=experts.static, query=experts.query)
            read = [
                [own if draw.random() < _RIGHT_SHARE else draw.choice([p for p in some if p != own] or [own])]
                for own, some in zip(batch.passages, served, strict=True)
            ]
        return Losses(self._steps(batch, [self._prompt(some) for some in read], experts).nats())

    def static_loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError("all that a reader has is static")

    def validated(self, batch: Batch, *, is_own: bool) -> Given:
        """The passage alone in the prompt."""
        before = [self._prompt([self._shifted(batch, position, is_own)]) for position, _ in batch.rows]
        return Given(self.network.static_experts(self.llm), tuple(before))

    @torch.no_grad()
    def answer_nats(self, batch: Batch, given: Given) -> float:
        each = dict(zip((position for position, _ in batch.rows), given.before, strict=True))
        return float(self._steps(batch, [each[p] for p in range(len(batch.passages))], given.experts).nats())

    def steps_of(self, batch: Batch) -> AnswerSteps:
        """With each question's passage alone in the prompt."""
        prompts = [self._prompt([passage]) for passage in batch.passages]
        return self._steps(batch, prompts, self.network.static_experts(self.llm))

    def _shifted(self, batch: Batch, position: int, is_own: bool) -> int:
        return batch.passages[position if is_own else (position + 1) % len(batch.passages)]

    def _together(self, batch: Batch, position: int, draw: random.Random) -> list[int]:
        """The passages that are served for the questions of one: itself, at any place among none to three others, of
        which some are left out where a prompt has no room for them."""
        own = batch.passages[position]
        n = draw.choice(_TOGETHER) - 1
        alike = [passage for passage in self._of_title.get(self.data.passages[own].title, ()) if passage != own]
        others = draw.sample(alike, min(n, len(alike)))
        rest = [passage for passage in batch.passages if passage != own and passage not in others]
        others += draw.sample(rest, min(n - len(others), len(rest)))
        place = draw.randint(0, len(others))
        others.insert(place, own)
        while len(others) > 1 and len(self.llm.prompt_ids(self._prompt(others))) > self._n_room:
            others.pop(0 if others[-1] == own else -1)
        return others

    def _prompt(self, passages: Sequence[int]) -> str:
        some: list[PassageInput] = [self.data.passages[passage] for passage in passages]
        return passages_prompt([(one.title, one.text) for one in some])

    def _steps(self, batch: Batch, before: Sequence[str], experts: Experts) -> AnswerSteps:
        """What Eq. 5 of the batch's questions is made of, behind the prompts of their passages."""
        llm = self.llm
        questions = [self.questions[question] for _, question in batch.rows]
        ids = pad_ids([question.ids for question in questions]).to(llm.device)
        prefixes = [llm.prompt_ids(prompt) for prompt in before]
        read = pad_ids(prefixes).to(llm.device)  # (P, L)
        rows = torch.tensor([position for position, _ in batch.rows], device=llm.device)
        lengths = torch.tensor([len(prefix) for prefix in prefixes], device=llm.device)
        is_read = torch.arange(read.shape[1], device=llm.device)[None] < lengths[:, None]
        with torch.no_grad():
            cache = llm.model.base_model(input_ids=read, use_cache=True).past_key_values
        assert isinstance(cache, DynamicCache)
        cache.batch_select_indices(rows)
        places = lengths[rows][:, None] + torch.arange(ids.shape[1], device=llm.device)[None]
        mask = torch.cat([is_read[rows].long(), torch.ones_like(ids)], 1)
        with plain_attention(llm), mount(llm.model, experts, self.network.config.layer):
            final = llm.model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
            ).last_hidden_state
        return self.answer_steps(questions, ids, final)


class ReaderTeacher(Teacher):
    """A tuned reader with the passage alone in its prompt; it is asked once about each question.

    Args:
        reader, llm, data: it is tuned for this LLM, and asked about this data.
        n_best: of the next words so many are told.
    """

    def __init__(self, reader: ReaderHypernetwork, llm: FrozenLLM, data: TrainingData, n_best: int = 32) -> None:
        self.run = ReaderRun(reader, llm, data, len(data.questions))
        self.n_best = min(n_best, llm.embeddings.shape[0])
        self._told: dict[int, tuple[Tensor, Tensor]] = {}

    def fingerprint(self) -> str:
        return self.run.network.fingerprint()

    def taught(self, rows: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        asked: dict[int, list[int]] = {}
        for passage, question in rows:
            if question not in self._told:
                asked.setdefault(passage, []).append(question)
        if asked:
            self._ask(Batch(list(asked), list(asked.values())))
        told = [self._told[question] for _, question in rows]
        return torch.cat([ids.long() for ids, _ in told]), torch.cat([shares.float() for _, shares in told])

    @torch.no_grad()
    def _ask(self, batch: Batch) -> None:
        shares, ids = self.run.steps_of(batch).logits.softmax(-1).topk(self.n_best)
        n_steps = [self.run.questions[question].n_steps for _, question in batch.rows]
        told = zip(torch.split(ids.int().cpu(), n_steps), torch.split(shares.half().cpu(), n_steps), strict=True)
        self._told |= dict(zip((question for _, question in batch.rows), told, strict=True))
