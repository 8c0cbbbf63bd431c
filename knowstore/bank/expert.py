"""Experts as the bank takes and gives them: plain named tensors, and the same encoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy.typing as npt

from knowstore.bank.codec import check_codec, decode, encode
from knowstore.config import Codec
from knowstore.errors import ExpertChecksumError, ExpertShapeError

Form = Literal["neurons", "factors", "latent"]
_DIGEST_BYTES = 16
_SEAL = "2-"  # tells a checksum of the whole row from one of its tensors alone

# "DR" is (D, R), LLM width by rank; a latent holds whatever its hypernetwork needs
_SHAPES: dict[str, dict[str, str]] = {
    "neurons": {"up": "DR", "down": "RD"},
    "factors": {"up1": "DR", "up2": "RD", "dw1": "DR", "dw2": "RD"},
}


@dataclass(frozen=True, eq=False)
class StoredExpert:
    """The expert of one passage.

    Args:
        passage_id: whose expert it is.
        form: `neurons` has up (D, R) and down (R, D); `factors` the four matrices of Eq. 2, up1 (D, R),
            up2 (R, D), dw1 (D, R), dw2 (R, D); `latent` the arrays from which the hypernetwork's last
            linear map makes the expert.
        tensors: the arrays by name; what the bank returns may be shared, do not write into it.
        segment_ranks: how many of the R each segment of the passage has, in order; may be empty.
        rank: R.

    Raises:
        ExpertShapeError: tensors, rank and segments that do not fit together.
    """

    passage_id: str
    form: Form
    tensors: Mapping[str, npt.NDArray[Any]]
    segment_ranks: tuple[int, ...]
    rank: int

    def __post_init__(self) -> None:
        if problem := self._misfit():
            raise _misfit(self.passage_id, f"does not fit together: {problem}")

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensors in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def _misfit(self) -> str | None:
        if self.form not in get_args(Form):
            return f"form is {self.form!r}, expected one of {', '.join(get_args(Form))}"
        if self.rank < 1 or not self.tensors:
            return f"rank is {self.rank} with {len(self.tensors)} tensors"
        if self.segment_ranks and (sum(self.segment_ranks) != self.rank or min(self.segment_ranks) < 0):
            return f"segment_ranks {self.segment_ranks} do not add up to rank {self.rank}"
        expected = _SHAPES.get(self.form)
        if expected is None:
            return None
        if self.tensors.keys() != expected.keys():
            return f"tensors are {sorted(self.tensors)}, expected {sorted(expected)}"
        first = next(iter(expected))
        width = self.tensors[first].shape[0] if self.tensors[first].ndim else 0
        sizes = {"D": width, "R": self.rank}
        for name, letters in expected.items():
            shape = tuple(sizes[letter] for letter in letters)
            if self.tensors[name].shape != shape:
                return f"{name} is {self.tensors[name].shape}, expected {shape}"
        return None


@dataclass(frozen=True)
class ExpertShape:
    """What the experts of one hypernetwork look like.

    Args:
        form: of those that are not latents.
        width: D.
        ranks: the R that there can be.
        latent: the shape of each array of a latent by name, None standing for R.
        words: the arrays of a latent that hold words of the LLM, with the lowest number that each may hold.
        n_words: how many words the LLM knows, None where that is not known.
    """

    form: Form
    width: int
    ranks: range
    latent: Mapping[str, tuple[int | None, ...]]
    words: Mapping[str, int]
    n_words: int | None

    def check(self, expert: StoredExpert) -> None:
        """Raise ExpertShapeError for an expert that the hypernetwork cannot have made, and that cannot be mounted."""
        problem = self._misfit(expert) or (self._latent_misfit(expert) if expert.form == "latent" else None)
        if problem:
            raise _misfit(expert.passage_id, f"is not one of the store's hypernetwork: {problem}")

    def _misfit(self, expert: StoredExpert) -> str | None:
        if expert.form not in (self.form, "latent"):
            return f"its form is {expert.form}, expected {self.form} or latent"
        if expert.rank not in self.ranks:
            return f"its rank is {expert.rank}, expected {self.ranks[0]} to {self.ranks[-1]}"
        n_segments = len(expert.segment_ranks)
        if not n_segments or (self.form == "factors" and n_segments > 1):
            return f"it has {n_segments} segments"
        found = expert.tensors[next(iter(_SHAPES[expert.form]))].shape[0] if expert.form in _SHAPES else self.width
        return None if found == self.width else f"its width is {found}, expected {self.width}"

    def _latent_misfit(self, expert: StoredExpert) -> str | None:
        expected = {name: tuple(n or expert.rank for n in shape) for name, shape in self.latent.items()}
        found = {name: tensor.shape for name, tensor in expert.tensors.items()}
        if found != expected:
            return f"its latent has {found}, expected {expected}"
        for name, low in self.words.items():
            tensor = expert.tensors[name]
            if tensor.min() < low or (self.n_words is not None and tensor.max() >= self.n_words):
                return f"{name} holds words that the language model does not know"
        return None


@dataclass(frozen=True)
class EncodedExpert:
    """A row of the bank: an expert as bytes, with what is needed to read and to trust them.

    `checksum` is of all that makes the row what it is (see `seal`), so that a row that got another's bytes is found
    too; banks of earlier versions have one of `data` alone. `batch_id` is the edit batch that wrote the row.
    """

    passage_id: str
    fingerprint: str
    codec: Codec
    form: Form
    rank: int
    segment_ranks: tuple[int, ...]
    data: bytes
    checksum: str
    batch_id: int

    @classmethod
    def make(cls, expert: StoredExpert, codec: Codec, fingerprint: str, batch_id: int) -> EncodedExpert:
        """Encode an expert.

        Raises:
            BankError: a codec that does not suit the form, or numbers that it cannot hold.
        """
        check_codec(codec, expert.form)
        made = cls(
            passage_id=expert.passage_id,
            fingerprint=fingerprint,
            codec=codec,
            form=expert.form,
            rank=expert.rank,
            segment_ranks=expert.segment_ranks,
            data=encode(expert.tensors, codec),
            checksum="",
            batch_id=batch_id,
        )
        return replace(made, checksum=made.seal())

    def seal(self) -> str:
        """BLAKE2b (16 bytes in hex, behind `2-`) of passage, maker, codec, form, ranks and `data`."""
        described = json.dumps(
            [self.passage_id, self.fingerprint, self.codec, self.form, self.rank, list(self.segment_ranks)]
        )
        digest = hashlib.blake2b(f"{len(described)} {described}".encode(), digest_size=_DIGEST_BYTES)
        digest.update(self.data)
        return f"{_SEAL}{digest.hexdigest()}"

    def description(self) -> dict[str, object]:
        """What the row says of the expert, without its numbers."""
        return {
            "fingerprint": self.fingerprint,
            "codec": self.codec,
            "form": self.form,
            "rank": self.rank,
            "segments": list(self.segment_ranks),
            "bytes": len(self.data),
            "checksum": self.checksum,
        }

    def check(self) -> None:
        """Raise ExpertChecksumError when the row is not what `checksum` was taken of."""
        is_old = len(self.checksum) == 2 * _DIGEST_BYTES
        found = hashlib.blake2b(self.data, digest_size=_DIGEST_BYTES).hexdigest() if is_old else self.seal()
        if found != self.checksum:
            raise ExpertChecksumError(
                f"the expert of passage {self.passage_id} has checksum {found}, {self.checksum} was written",
                kept="the bank is as it was; the other experts can be used",
                fix="run `knowstore verify --repair`, or remove the passage and ingest it again",
            )

    def decode(self) -> StoredExpert:
        """The expert, after its checksum is verified.

        Raises:
            ExpertChecksumError: the bytes are not those that were written.
            BankError: bytes that are not an encoded expert.
        """
        self.check()
        return self.decode_unchecked()

    def decode_unchecked(self) -> StoredExpert:
        """The expert of bytes whose checksum nobody verifies, or verifies elsewhere.

        Raises:
            BankError: bytes that are not an encoded expert.
        """
        return StoredExpert(self.passage_id, self.form, decode(self.data), self.segment_ranks, self.rank)


def _misfit(passage_id: str, problem: str) -> ExpertShapeError:
    return ExpertShapeError(
        f"the expert of passage {passage_id} {problem}",
        kept="the bank is as it was",
        fix="make the expert again with the hypernetwork that the store is configured for",
    )
