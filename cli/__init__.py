"""The `knowstore` command; a file per group of commands, `output` the only printer."""

from __future__ import annotations

import sys
from io import TextIOWrapper


def main() -> None:
    """Run the `knowstore` command and exit with its status: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a text of the store may not fit the terminal's encoding
    from .app import app

    app(prog_name="knowstore")
