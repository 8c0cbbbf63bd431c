"""Experts of passages that are in no store, made once for everything that is measured with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowstore._loaded import LoadedModels, stored_experts
from knowstore.bank import EncodedExpert, StoredExpert
from knowstore.config import Codec
from knowstore.records import Passage
from knowstore.sources import sentence_spans

if TYPE_CHECKING:
    from knowstore.experts import Expert

BATCH_ID = 1
"""The edit batch that the encoded experts belong to."""

_BATCH = 20  # passages in one forward


@dataclass(frozen=True)
class MadeExperts:
    """The latents of passages, what the hypernetwork's last map makes of them, and the fingerprint of their maker."""

    latents: list[StoredExpert]
    experts: list[Expert]
    fingerprint: str

    @classmethod
    def make(cls, models: LoadedModels, passages: Sequence[Passage]) -> MadeExperts:
        """The experts of passages with their sentences as segments, in order."""
        from knowstore.experts import PassageInput

        latents: list[StoredExpert] = []
        experts: list[Expert] = []
        for first in range(0, len(passages), _BATCH):
            part = passages[first : first + _BATCH]
            inputs = [PassageInput(one.title, one.text, tuple(sentence_spans(one.text))) for one in part]
            made = models.generate([one.passage_id for one in part], inputs, latent=True)
            latents += made
            experts += models.mountable(made)
        return cls(latents, experts, models.fingerprints["experts"])

    def encoded(self, codec: Codec) -> list[EncodedExpert]:
        """As a bank of this codec keeps them.

        Raises:
            BankError: numbers that the codec cannot hold.
        """
        ids = [one.passage_id for one in self.latents]
        some = self.latents if codec == "latent" else stored_experts(ids, self.experts)
        return [EncodedExpert.make(one, codec, self.fingerprint, BATCH_ID) for one in some]
