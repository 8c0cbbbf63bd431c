"""Hostile inputs for everything that reads what others wrote; `python -m tests.fuzz --help` runs many of them."""
