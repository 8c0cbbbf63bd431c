"""Measurements that report numbers: what experts carry, beside other methods and over a long life of edits, and how
fast everything is."""

from knowstore._drawing import can_plot
from knowstore.bench.ablation import SIGNALS, VARIANTS, AblationConfig, run_ablation
from knowstore.bench.answers import run_answers
from knowstore.bench.ceiling import CeilingConfig, run_ceiling
from knowstore.bench.codecs import run_codecs
from knowstore.bench.controls import run_controls
from knowstore.bench.edits import EditsConfig, read_unrelated, run_edits
from knowstore.bench.latency import run_ask
from knowstore.bench.layers import LayersConfig, run_layers
from knowstore.bench.locality import run_locality
from knowstore.bench.method_plots import plot_methods, plot_sequence
from knowstore.bench.methods import run_methods
from knowstore.bench.peers import PeersConfig, lacking_peers, run_peers
from knowstore.bench.plots import (
    plot_ablation,
    plot_answers,
    plot_ceiling,
    plot_controls,
    plot_layers,
    plot_peers,
    plot_rerank,
    plot_speed,
    plot_training,
)
from knowstore.bench.reranking import run_rerank
from knowstore.bench.sequence import SequenceConfig, run_sequence
from knowstore.bench.speed import SpeedConfig, run_speed

__all__ = [
    "SIGNALS",
    "VARIANTS",
    "AblationConfig",
    "CeilingConfig",
    "EditsConfig",
    "LayersConfig",
    "PeersConfig",
    "SequenceConfig",
    "SpeedConfig",
    "can_plot",
    "lacking_peers",
    "plot_ablation",
    "plot_answers",
    "plot_ceiling",
    "plot_controls",
    "plot_layers",
    "plot_methods",
    "plot_peers",
    "plot_rerank",
    "plot_sequence",
    "plot_speed",
    "plot_training",
    "read_unrelated",
    "run_ablation",
    "run_answers",
    "run_ask",
    "run_ceiling",
    "run_codecs",
    "run_controls",
    "run_edits",
    "run_layers",
    "run_locality",
    "run_methods",
    "run_peers",
    "run_rerank",
    "run_sequence",
    "run_speed",
]
