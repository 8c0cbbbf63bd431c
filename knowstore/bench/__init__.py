"""Measurements that report numbers: what experts carry (controls), how they compare with other methods, and how long
questions take; and their pictures."""

from knowstore.bench.controls import run_controls
from knowstore.bench.latency import run_ask
from knowstore.bench.methods import run_methods
from knowstore.bench.plots import can_plot, plot_controls, plot_methods, plot_training
from knowstore.bench.reranking import run_rerank

__all__ = [
    "can_plot",
    "plot_controls",
    "plot_methods",
    "plot_training",
    "run_ask",
    "run_controls",
    "run_methods",
    "run_rerank",
]
