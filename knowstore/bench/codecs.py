"""What experts take on disk in each codec, and what the codec costs in answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import get_args

from knowstore._loaded import LoadedModels
from knowstore.bank import EncodedExpert
from knowstore.config import Codec
from knowstore.experts import PassageInput
from knowstore.records import Passage
from knowstore.sources import sentence_spans

CODECS: tuple[Codec, ...] = get_args(Codec)
_BATCH = 20  # passages in one forward


def encoded_experts(models: LoadedModels, passages: Sequence[Passage], codec: Codec) -> list[EncodedExpert]:
    """The experts of passages as a bank of this codec keeps them."""
    made: list[EncodedExpert] = []
    for first in range(0, len(passages), _BATCH):
        part = passages[first : first + _BATCH]
        inputs = [PassageInput(one.title, one.text, tuple(sentence_spans(one.text))) for one in part]
        experts = models.generate([one.passage_id for one in part], inputs, latent=codec == "latent")
        made += [EncodedExpert.make(expert, codec, models.fingerprints["experts"], 1) for expert in experts]
    return made


def codec_sizes(experts: Mapping[Codec, Sequence[EncodedExpert]]) -> list[dict[str, object]]:
    """Rows of {codec, n, bytes_per_passage}: the mean of what the codec writes, without the table around it."""
    return [
        {"codec": codec, "n": len(some), "bytes_per_passage": fmean(len(expert.data) for expert in some)}
        for codec, some in experts.items()
    ]
