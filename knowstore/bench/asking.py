"""Asking many questions of passages that are in no store, as `ask` would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from knowstore._answering import Reader, prompt_of
from knowstore._loaded import LoadedModels
from knowstore.bank import StoredExpert
from knowstore.records import Hit, Mode, MountedExpert

if TYPE_CHECKING:
    from knowstore.experts import Experts, PassageInput

_BATCH = 16


class GeneratedExperts:
    """In the place of a bank: experts are generated when they are first asked for."""

    def __init__(self, models: LoadedModels) -> None:
        self._models = models
        self._experts: dict[str, StoredExpert] = {}
        self._inputs: dict[str, PassageInput] = {}

    def read(self, hits: Sequence[Hit]) -> None:
        """Take note of passages whose experts may be asked for."""
        from knowstore.experts import PassageInput

        self._inputs |= {hit.passage_id: PassageInput(hit.title, hit.text, hit.segments) for hit in hits}

    def get(self, ids: Sequence[str]) -> dict[str, StoredExpert]:
        missing = [passage_id for passage_id in dict.fromkeys(ids) if passage_id not in self._experts]
        for first in range(0, len(missing), _BATCH):
            part = missing[first : first + _BATCH]
            made = self._models.generate(part, [self._inputs[passage_id] for passage_id in part], latent=True)
            self._experts |= {expert.passage_id: expert for expert in made}
        return {passage_id: self._experts[passage_id] for passage_id in ids}


def answer_all(
    reader: Reader,
    questions: Sequence[str],
    chosen: Sequence[Sequence[MountedExpert]],
    mode: Mode = "experts",
    *,
    is_static: bool = False,
    batch_size: int = _BATCH,
) -> list[str]:
    """The answers to Q questions with the passages that were chosen for each mounted, read, or both.

    Args:
        reader: its models and how they generate; its bank has the experts.
        chosen: for each question what `Reader.weigh` gave.
        mode: of `ask`.
        is_static: mount the static expert alone, whatever was chosen.
        batch_size: questions in one generation; in bfloat16 what stands beside a question can change its answer, which
            one at a time never does.
    """
    from knowstore.experts import generate

    models = reader.models
    texts: list[str] = []
    for first in range(0, len(questions), batch_size):
        part = chosen[first : first + batch_size]
        prompts = [
            prompt_of(question, reader.read(some, mode))
            for question, some in zip(questions[first : first + batch_size], part, strict=True)
        ]
        if is_static:
            experts: Experts | None = replace(models.hypernetwork.static_experts(models.llm), query=models.query)
        else:
            experts = reader.experts(part, mode)
        generated = generate(models.llm, prompts, experts, models.hypernetwork.config.layer, reader.generation)
        texts += [one.text for one in generated]
    return texts
