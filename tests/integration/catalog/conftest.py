"""The catalog's tests run twice: on a SQLite file, and on a private PostgreSQL server where one is installed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from knowstore.catalog import Catalog

_database_numbers = itertools.count(1)


@pytest.fixture(params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Makes URLs of empty databases."""
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path / f'catalog{next(_database_numbers)}.db'}"
    server = request.getfixturevalue("postgresql_url")

    def create() -> str:
        """A schema of its own stands for a database: it is faster to make."""
        name = f"catalog{next(_database_numbers)}"
        engine = create_engine(make_url(server).set(drivername="postgresql+psycopg"))
        with engine.begin() as connection:
            connection.execute(text(f"CREATE SCHEMA {name}"))
        engine.dispose()
        return f"{server}?options=-csearch_path%3D{name}"

    return create


@pytest.fixture
def url(new_url: Callable[[], str]) -> str:
    return new_url()


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    with Catalog.open(url) as opened:
        yield opened
