"""Training of hypernetworks by meta-learning (Eq. 5)."""

from knowstore.training.data import QuestionRow, TrainingData, load_questions, read_rows
from knowstore.training.hypernetwork import TrainingConfig, TrainingProgress, train_tokens

__all__ = [
    "QuestionRow",
    "TrainingConfig",
    "TrainingData",
    "TrainingProgress",
    "load_questions",
    "read_rows",
    "train_tokens",
]
