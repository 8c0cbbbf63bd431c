"""Imports point downwards only; read from the source, so that nothing is imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = {"errors", "records", "config", "prompts"}
PARTS = {"lance", "passages", "bank", "catalog", "retrieval", "experts", "evaluation", "sources", "models"}
MAY_IMPORT: dict[str, set[str]] = {
    **dict.fromkeys(BASE, BASE),
    "encoders": BASE | {"encoders"},
    **{part: BASE | {part} for part in PARTS},
    "passages": BASE | {"passages", "lance"},
    "bank": BASE | {"bank", "lance"},
    "retrieval": BASE | {"retrieval", "encoders"},
    "experts": BASE | {"experts", "encoders"},
    "training": BASE | {"training", "experts", "retrieval", "evaluation", "encoders"},
    "store": BASE | PARTS | {"store", "training", "encoders"},
    "audits": BASE | PARTS | {"audits", "store"},
    "baselines": BASE | PARTS | {"baselines", "store", "training"},
    "bench": BASE | PARTS | {"bench", "audits", "baselines", "store", "training", "knowstore"},
    "knowstore": BASE | PARTS | {"store", "training"},
}
HEAVY = {"torch", "transformers", "lancedb", "pyarrow", "sqlalchemy", "alembic", "faiss"}
MAY_NOT_IMPORT: dict[str, set[str]] = {
    "lance": {"torch", "transformers", "sqlalchemy", "alembic"},
    "passages": {"torch", "transformers", "sqlalchemy", "alembic"},
    "bank": {"transformers", "sqlalchemy", "alembic"},
    "catalog": {"torch", "transformers", "lancedb", "pyarrow", "faiss"},
    "retrieval": {"sqlalchemy", "alembic", "lancedb", "pyarrow"},
    "experts": {"sqlalchemy", "alembic", "lancedb", "pyarrow", "faiss"},
    "encoders": {"sqlalchemy", "alembic", "lancedb", "pyarrow", "faiss"},
    "sources": {"torch", "transformers", "lancedb", "sqlalchemy", "alembic", "faiss"},
    "evaluation": HEAVY,
    "training": {"sqlalchemy", "alembic", "lancedb", "pyarrow", "faiss"},
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(file: Path, *, is_at_top_only: bool = False) -> Iterator[str]:
    """Dotted names of all modules that a file imports, those for type checkers included."""
    tree = ast.parse(file.read_text("utf-8"))
    for node in tree.body if is_at_top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = file.relative_to(ROOT).parts[: -node.level]
            yield from (".".join([*here, *filter(None, [node.module]), alias.name]) for alias in node.names)


def part_of(file: Path) -> str:
    """The part a file of `knowstore/` belongs to; `_*.py` are the store's own modules."""
    name = file.relative_to(ROOT / "knowstore").parts[0].removesuffix(".py")
    if name == "__init__":
        return "knowstore"
    return "store" if name.startswith("_") else name


def own_part(module: str) -> str | None:
    """The part of a dotted name of ours, None for a library."""
    top, _, rest = module.partition(".")
    if top != "knowstore":
        return None
    name = rest.split(".")[0]
    if name.startswith("_"):
        return "store"
    return name if (ROOT / "knowstore" / name).exists() or (ROOT / "knowstore" / f"{name}.py").exists() else "knowstore"


@pytest.mark.parametrize("file", sources("knowstore"), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_downwards(file: Path) -> None:
    part = part_of(file)
    assert part in MAY_IMPORT, f"{part} is a part that the rules do not name"
    found = {own for module in imported(file) if (own := own_part(module)) is not None}
    assert found <= MAY_IMPORT[part], f"{part} imports {sorted(found - MAY_IMPORT[part])}"
    libraries = {module.split(".")[0] for module in imported(file)}
    assert not libraries & MAY_NOT_IMPORT.get(part, set())


@pytest.mark.parametrize("name", sorted(BASE))
def test_the_lowest_level_needs_the_standard_library_alone(name: str) -> None:
    libraries = {module.split(".")[0] for module in imported(ROOT / "knowstore" / f"{name}.py")}
    assert libraries <= {*sys.stdlib_module_names, "knowstore"}


@pytest.mark.parametrize("file", sources("cli"), ids=lambda file: str(file.relative_to(ROOT)))
def test_the_command_line_uses_public_names_only(file: Path) -> None:
    """Names that `knowstore` or one of its parts exports, and none from a module within a part."""
    for module in imported(file):
        if own_part(module) is None:
            continue
        _, part, *names = module.split(".")
        assert len(names) <= 1, f"{module} is no public name"
        assert not any(name.startswith("_") for name in (part, *names)), f"{module} is no public name"


@pytest.mark.parametrize("folder", ["cli", "knowstore/__init__.py"])
def test_nothing_heavy_is_imported_before_it_is_needed(folder: str) -> None:
    files = [ROOT / folder] if folder.endswith(".py") else sources(folder)
    for file in files:
        heavy = {module.split(".")[0] for module in imported(file, is_at_top_only=True)} & HEAVY
        assert not heavy, f"{file} imports {sorted(heavy)} when it is loaded"


def test_migrations_are_frozen_history() -> None:
    for file in sources("migrations"):
        ours = [module for module in imported(file) if module.startswith("knowstore")]
        if file.name == "env.py":
            assert all(own_part(module) == "catalog" for module in ours)
        else:
            assert ours == []
