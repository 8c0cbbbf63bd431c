"""Measurements that report numbers: what experts carry, beside other methods and over a long life of edits, and how
fast everything is."""

from knowstore._drawing import can_plot
from knowstore.bench.answers import run_answers
from knowstore.bench.codecs import run_codecs
from knowstore.bench.controls import run_controls
from knowstore.bench.edits import EditsConfig, read_unrelated, run_edits
from knowstore.bench.latency import run_ask
from knowstore.bench.locality import run_locality
from knowstore.bench.method_plots import plot_methods, plot_sequence
from knowstore.bench.methods import run_methods
from knowstore.bench.plots import plot_answers, plot_controls, plot_rerank, plot_speed, plot_training
from knowstore.bench.reranking import run_rerank
from knowstore.bench.sequence import SequenceConfig, run_sequence
from knowstore.bench.speed import SpeedConfig, run_speed

__all__ = [
    "EditsConfig",
    "SequenceConfig",
    "SpeedConfig",
    "can_plot",
    "plot_answers",
    "plot_controls",
    "plot_methods",
    "plot_rerank",
    "plot_sequence",
    "plot_speed",
    "plot_training",
    "read_unrelated",
    "run_answers",
    "run_ask",
    "run_codecs",
    "run_controls",
    "run_edits",
    "run_locality",
    "run_methods",
    "run_rerank",
    "run_sequence",
    "run_speed",
]
