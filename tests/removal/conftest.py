from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passages", type=int, default=0, help="how many passages the removal measurement takes")
    parser.addoption("--questions", type=int, default=200, help="how many questions it compares")
