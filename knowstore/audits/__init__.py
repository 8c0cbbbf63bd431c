"""Audits: what the store still knows of every edit batch, asked again and again."""

from knowstore.audits.making import MadeProbes, make_probes
from knowstore.audits.probes import ProbesFile, ProbesReport, add_probes, read_probes
from knowstore.audits.results import summarise
from knowstore.audits.roles import Selection
from knowstore.audits.run import run_audit

__all__ = [
    "MadeProbes",
    "ProbesFile",
    "ProbesReport",
    "Selection",
    "add_probes",
    "make_probes",
    "read_probes",
    "run_audit",
    "summarise",
]
