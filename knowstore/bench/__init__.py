"""Measurements that report numbers: what experts carry (controls), and how long questions take."""

from knowstore.bench.controls import run_controls
from knowstore.bench.latency import run_ask

__all__ = ["run_ask", "run_controls"]
