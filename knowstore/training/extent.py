"""How far a training run goes, and what it keeps out of the data."""

from __future__ import annotations

from pathlib import Path

from knowstore.errors import TrainingError
from knowstore.training.data import TrainingData

_MOST_HELD_OUT = 200


def fraction_done(done: float, whole: float) -> float:
    """How much of a run is behind: all of one that has no length."""
    return done / whole if whole > 0 else 1.0


def n_kept_out(wanted: int | None, data: TrainingData) -> int:
    """How many questions to keep out: a tenth of them and at most 200, unless a number is given."""
    return min(_MOST_HELD_OUT, len(data.questions) // 10) if wanted is None else wanted


def no_steps() -> TrainingError:
    """The error of a run that took no step."""
    return TrainingError("a run of no time and no steps", kept="nothing was trained", fix="give it minutes or steps")


def no_gradient(norm: float, step: int, checkpoint: Path) -> TrainingError:
    """The error of a step that would end in weights that are not finite."""
    return TrainingError(
        f"the gradient's norm is {norm} at step {step}", kept=f"the last checkpoint in {checkpoint}",
        fix="run again with a lower learning rate, or in float32",
    )  # fmt: skip
