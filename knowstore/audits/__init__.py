"""Audits: what the store still knows of every edit batch, asked again and again, and their report."""

from knowstore._drawing import can_plot
from knowstore.audits.making import MadeProbes, make_probes
from knowstore.audits.probes import (
    ProbesFile,
    ProbesReport,
    add_probes,
    live_probes,
    probe_row,
    probes_text,
    read_probes,
    write_probes,
)
from knowstore.audits.report import write_report
from knowstore.audits.results import summarise
from knowstore.audits.roles import Selection
from knowstore.audits.run import run_audit

__all__ = [
    "MadeProbes",
    "ProbesFile",
    "ProbesReport",
    "Selection",
    "add_probes",
    "can_plot",
    "live_probes",
    "make_probes",
    "probe_row",
    "probes_text",
    "read_probes",
    "run_audit",
    "summarise",
    "write_probes",
    "write_report",
]
