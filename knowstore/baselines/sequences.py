"""Facts and passages as token sequences that a loss is taken of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from knowstore.baselines.edits import Edit, TaughtFact
from knowstore.experts import FrozenLLM
from knowstore.experts.llm import pad_ids
from knowstore.prompts import answer_target, passages_prompt, question_prompt


@dataclass(frozen=True)
class TokenRow:
    """Token ids, of which the first `n_given` are read and the others are to be written; `subject` is the place of
    the last token of the fact's subject."""

    ids: tuple[int, ...]
    n_given: int
    subject: int = 0


def fact_sequence(llm: FrozenLLM, fact: TaughtFact, *, before: str = "") -> TokenRow:
    """A fact as it is asked and answered, the stop included, behind a line `before`."""
    prompt = before + question_prompt(fact.question)
    given = llm.prompt_ids(prompt)
    ids = [*given, *llm.prompt_ids(answer_target(fact.target), is_start=False)]
    return TokenRow(tuple(ids), len(given), _subject_place(llm, prompt, fact.subject, given))


def _subject_place(llm: FrozenLLM, prompt: str, subject: str, given: Sequence[int]) -> int:
    """The token that ends the subject's last mention; the prompt's last one where it is not mentioned."""
    place = prompt.rfind(subject)
    if not subject or place < 0:
        return len(given) - 1
    plain, ends = llm.prompt_ids_and_ends(prompt)
    last = next(number for number, end in enumerate(ends) if end >= place + len(subject))
    return len(given) - len(plain) + last


def essence_row(llm: FrozenLLM, fact: TaughtFact) -> TokenRow:
    """`SUBJECT is a`: what the LLM says next is what an edit of one fact should keep. The token that stands there
    to be written is of no interest, only the distribution."""
    subject = fact.subject or fact.question
    prompt = f"{subject} is a"
    given = llm.prompt_ids(prompt)
    return TokenRow((*given, given[-1]), len(given), _subject_place(llm, prompt, subject, given))


def passage_sequence(llm: FrozenLLM, edit: Edit) -> TokenRow:
    """A passage as it stands in a prompt, all of it to be written."""
    ids = llm.prompt_ids(passages_prompt([(edit.passage.title, edit.passage.text)]))
    return TokenRow(tuple(ids), 1)


def logits_of(llm: FrozenLLM, sequences: Sequence[TokenRow]) -> tuple[Tensor, Tensor]:
    """What the LLM predicts at the steps that are to be written, and what is right there.

    Returns: logits (N, vocabulary) in float32 and token ids (N,), sequence after sequence.
    """
    ids = pad_ids([one.ids for one in sequences]).to(llm.device)  # (B, T)
    places = torch.arange(ids.shape[1], device=llm.device)
    given = torch.tensor([one.n_given for one in sequences], device=llm.device)[:, None]
    length = torch.tensor([len(one.ids) for one in sequences], device=llm.device)[:, None]
    is_written = ((places >= given) & (places < length))[:, 1:]
    steps = is_written.any(0).nonzero()[:, 0]  # of these alone logits are computed
    logits = llm.model(input_ids=ids, use_cache=False, logits_to_keep=steps).logits
    return logits[is_written[:, steps]].float(), ids[:, 1:][is_written]


def writing_loss(llm: FrozenLLM, sequences: Sequence[TokenRow]) -> Tensor:
    """Mean of minus the log-probability of the tokens that are to be written (Eq. 5)."""
    return cross_entropy(*logits_of(llm, sequences))


def row_losses(logits: Tensor, right: Tensor, rows: Sequence[TokenRow]) -> Tensor:
    """(B,): the mean of minus the log-probabilities of what each row is to write.

    Args:
        logits, right: of `logits_of` for these rows.
    """
    losses = cross_entropy(logits, right, reduction="none")
    return torch.stack([part.mean() for part in torch.split(losses, [len(row.ids) - row.n_given for row in rows])])
