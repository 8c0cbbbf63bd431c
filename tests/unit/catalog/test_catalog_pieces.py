from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import knowstore._migrations
from knowstore.catalog.database import Database
from knowstore.catalog.lock import _command
from knowstore.catalog.placements import stretches


@pytest.mark.parametrize(
    ("placements", "stretch"),
    [
        ([(1, None)], (1, None)),
        ([(1, 3)], (1, 3)),
        ([(1, 3), (3, None)], (1, None)),
        ([(1, 3), (4, None)], (4, None)),
        ([(1, 9), (2, 3)], (1, 9)),
        ([(1, 2), (4, 6), (5, 8)], (4, 8)),
        ([(1, None), (2, 3)], (1, None)),
        ([(1, 2), (3, None), (5, 6)], (3, None)),
    ],
)
def test_placements_that_overlap_or_touch_are_one_stretch(
    placements: list[tuple[int, int | None]], stretch: tuple[int, int | None]
) -> None:
    assert list(stretches(placements))[-1] == stretch


def test_stretches_come_in_order_and_end_where_nothing_follows() -> None:
    assert list(stretches([(1, 2), (2, 3), (5, 6), (8, None)])) == [(1, 3), (5, 6), (8, None)]
    assert list(stretches([])) == []


def test_the_command_shown_to_others_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    store = "postgresql://me:s3cret@host/db?password=s3cret"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/knowstore", "--store", store, "ingest", "x" * 500])
    assert _command().startswith("knowstore --store postgresql://***@host/db?password=*** ingest xxx")
    assert len(_command()) == 120


@pytest.mark.parametrize(
    ("store", "shown"),
    [
        ("postgresql://u:s3 cr et@host/db", "postgresql://***@host/db"),
        ("--store=postgresql://u:s3@cr\n@et@host/db", "--store=postgresql://***@host/db"),
        ("postgresql://host/db?password=s3 cr et&user=u", "postgresql://host/db?password=***&user=u"),
    ],
)
def test_passwords_with_blanks_are_not_shown_to_others(monkeypatch: pytest.MonkeyPatch, store: str, shown: str) -> None:
    monkeypatch.setattr(sys, "argv", ["knowstore", store, "ask", "Who?"])
    assert _command() == f"knowstore {shown} ask Who?"


@pytest.mark.parametrize(
    "url",
    ["postgresql://u@h/d?password=s3cret", "postgresql://?/?password=s3cret", "postgresql://h/d?a=b?password=s3cret"],
)
def test_a_catalog_is_shown_without_what_its_options_are_set_to(url: str) -> None:
    database = Database(url)
    assert database.name.startswith("postgresql+psycopg://")
    assert "s3cret" not in database.name


@pytest.mark.parametrize("url", ["sqlite:///:s3cret@host/d", "sqlite:///me:s3cret@host/d", "sqlite:////me:s3:cret@h"])
def test_a_password_behind_the_scheme_of_a_file_is_not_shown(url: str, tmp_path: Path) -> None:
    assert "cret" not in Database(url).name
    assert Database(f"sqlite:///{tmp_path}/a:b").name.endswith("/a%3Ab")


def test_revisions_import_nothing_from_knowstore() -> None:
    folder = Path(knowstore._migrations.__file__).parent / "versions"
    revisions = list(folder.glob("[0-9]*.py"))
    assert revisions
    for path in revisions:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "knowstore"]
