"""Experts of passages that are in no store, made once for everything that is measured with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knowstore._loaded import LoadedModels, stored_experts
from knowstore.bank import EncodedExpert, StoredExpert
from knowstore.config import Codec
from knowstore.records import Passage
from knowstore.sources import sentence_spans

BATCH_ID = 1
"""The edit batch that the encoded experts belong to."""

_BATCH = 20  # passages in one forward


@dataclass(frozen=True)
class MadeExperts:
    """The latents of passages, and the models that made them."""

    models: LoadedModels
    latents: list[StoredExpert]

    @property
    def fingerprint(self) -> str:
        """What identifies their maker."""
        return self.models.fingerprints["experts"]

    @classmethod
    def make(cls, models: LoadedModels, passages: Sequence[Passage]) -> MadeExperts:
        """The experts of passages with their sentences as segments, in order."""
        from knowstore.experts import PassageInput

        latents: list[StoredExpert] = []
        for first in range(0, len(passages), _BATCH):
            part = passages[first : first + _BATCH]
            inputs = [PassageInput(one.title, one.text, tuple(sentence_spans(one.text))) for one in part]
            latents += models.generate([one.passage_id for one in part], inputs, latent=True)
        return cls(models, latents)

    def encoded(self, codec: Codec) -> list[EncodedExpert]:
        """As a bank of this codec keeps them.

        Raises:
            BankError: numbers that the codec cannot hold.
        """
        out: list[EncodedExpert] = []
        for first in range(0, len(self.latents), _BATCH):
            some = self.latents[first : first + _BATCH]
            if codec != "latent":
                some = stored_experts([one.passage_id for one in some], self.models.mountable(some))
            out += [EncodedExpert.make(one, codec, self.fingerprint, BATCH_ID) for one in some]
        return out
