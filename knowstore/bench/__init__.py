"""Measurements that report numbers: what experts carry (controls), and how long questions take; and their pictures."""

from knowstore.bench.answers import run_answers
from knowstore.bench.controls import run_controls
from knowstore.bench.latency import run_ask
from knowstore.bench.locality import run_locality
from knowstore.bench.plots import can_plot, plot_answers, plot_controls, plot_training
from knowstore.bench.reranking import run_rerank

__all__ = [
    "can_plot",
    "plot_answers",
    "plot_controls",
    "plot_training",
    "run_answers",
    "run_ask",
    "run_controls",
    "run_locality",
    "run_rerank",
]
