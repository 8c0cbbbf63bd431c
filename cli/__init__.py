"""The `knowstore` command; a file per group of commands, `output` the only printer."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper


def main() -> None:
    """Run the `knowstore` command and exit with its status: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a text of the store may not fit the terminal's encoding
    from .app import app

    app(prog_name="knowstore")


def _open_closed_streams() -> None:
    """In the place of standard streams that were closed, which a file of the store would take as its own otherwise."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
