"""Measurements that report numbers: what experts carry (controls), how fast everything is, and their pictures."""

from knowstore.bench.codecs import run_codecs
from knowstore.bench.controls import run_controls
from knowstore.bench.latency import run_ask
from knowstore.bench.plots import can_plot, plot_controls, plot_speed, plot_training
from knowstore.bench.reranking import run_rerank
from knowstore.bench.speed import SpeedConfig, run_speed

__all__ = [
    "SpeedConfig",
    "can_plot",
    "plot_controls",
    "plot_speed",
    "plot_training",
    "run_ask",
    "run_codecs",
    "run_controls",
    "run_rerank",
    "run_speed",
]
