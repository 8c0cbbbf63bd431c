"""`python -m tests.faults`: see the package's docstring."""

from __future__ import annotations

from tests.faults.command import main

main()
