"""The `knowstore` command."""

from __future__ import annotations


def main() -> None:
    """Run the `knowstore` command."""
