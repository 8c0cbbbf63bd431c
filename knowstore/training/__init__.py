"""Training of hypernetworks by meta-learning (Eq. 5), and of rerankers by contrast (Eq. 8)."""

from knowstore.training.data import QuestionRow, TrainingData, load_questions, read_passages, read_rows
from knowstore.training.hypernetwork import TrainingConfig, TrainingProgress, train_hypernetwork
from knowstore.training.pairs import PairTrainingConfig, train_pairs
from knowstore.training.ranks import Ranks, joined_ranks
from knowstore.training.reranker import (
    Judged,
    RerankerTrainingConfig,
    accuracies,
    calibrate,
    calibrate_words,
    judge,
    mine,
    train_reranker,
)
from knowstore.training.steps import RerankerProgress

__all__ = [
    "Judged",
    "PairTrainingConfig",
    "QuestionRow",
    "Ranks",
    "RerankerProgress",
    "RerankerTrainingConfig",
    "TrainingConfig",
    "TrainingData",
    "TrainingProgress",
    "accuracies",
    "calibrate",
    "calibrate_words",
    "joined_ranks",
    "judge",
    "load_questions",
    "mine",
    "read_passages",
    "read_rows",
    "train_hypernetwork",
    "train_pairs",
    "train_reranker",
]
