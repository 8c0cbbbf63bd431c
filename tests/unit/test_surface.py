"""What strangers meet: errors with three parts, exported names, docstrings."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from knowstore import errors
from knowstore.errors import KnowledgeStoreError

ROOT = Path(__file__).parents[2]
ERRORS = {name: error for name, error in vars(errors).items() if inspect.isclass(error)}
FILES = sorted([*(ROOT / "knowstore").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])
PACKAGES = sorted(file for file in (ROOT / "knowstore").rglob("__init__.py"))


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_the_tree_in_the_docstring_is_the_hierarchy() -> None:
    lines = (errors.__doc__ or "").splitlines()
    left = min(line.index("KnowledgeStoreError") for line in lines if "KnowledgeStoreError" in line)
    drawn: dict[str, str | None] = {}
    path: list[str] = []
    for line in lines:
        found = re.search(r"[A-Z]\w+Error\b", line)
        if found is None:
            continue
        depth = (found.start() - left) // 4
        path[depth:] = [found.group()]
        drawn[found.group()] = path[depth - 1] if depth else None
    bases = {name: error.__bases__[0].__name__ for name, error in ERRORS.items()}
    assert drawn == {name: None if base == "Exception" else base for name, base in bases.items()}


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_says_what_was_kept_and_what_to_do(name: str) -> None:
    error = ERRORS[name]("it broke", kept="everything", fix="mend it")
    assert isinstance(error, KnowledgeStoreError)
    assert (error.what, error.kept, error.fix) == ("it broke", "everything", "mend it")
    assert str(error) == "it broke\nKept: everything\nFix: mend it"
    assert error.__doc__


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_error_that_is_made_has_three_parts(file: Path) -> None:
    for node in ast.walk(parsed(file)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if called not in ERRORS:
            continue
        place = f"{name_of(file)}:{node.lineno}"
        given = [*("what", "kept", "fix")[: len(node.args)], *(keyword.arg for keyword in node.keywords)]
        assert sorted(str(name) for name in given) == ["fix", "kept", "what"], place
        for value in [*node.args, *(keyword.value for keyword in node.keywords)]:
            assert not isinstance(value, ast.Starred), place
            if isinstance(value, ast.Constant):
                assert isinstance(value.value, str), place
                assert value.value.strip(), place


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_errors_raised_from_others_name_their_cause(file: Path) -> None:
    for handler in ast.walk(parsed(file)):
        if not isinstance(handler, ast.ExceptHandler):
            continue
        for node in ast.walk(handler):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                assert node.cause is not None, f"{name_of(file)}:{node.lineno} raises without `from`"


def exported(file: Path) -> list[str]:
    """The strings of a module's `__all__`."""
    for node in parsed(file).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return [
                part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
    return []


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions() -> dict[str, tuple[Path, Definition]]:
    """Public classes and functions at the top of a module, by name."""
    out: dict[str, tuple[Path, Definition]] = {}
    for file in FILES:
        for node in parsed(file).body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                out[node.name] = file, node
    return out


@pytest.mark.parametrize("file", PACKAGES, ids=name_of)
def test_every_package_says_what_it_is(file: Path) -> None:
    assert ast.get_docstring(parsed(file))


def test_exported_names_are_documented_and_listed_once() -> None:
    known = definitions()
    for file in PACKAGES:
        names = exported(file)
        assert len(names) == len(set(names)), name_of(file)
        for name in names:
            if name in known:
                where, node = known[name]
                assert ast.get_docstring(node), f"{name} of {name_of(where)}:{node.lineno} has no docstring"


def methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Public methods of a class; properties and what Python calls by itself are not counted."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and not method.decorator_list:
            yield method


def test_public_methods_are_documented_where_they_are_first_declared() -> None:
    known = definitions()
    documented = {
        method.name
        for _, node in known.values()
        if isinstance(node, ast.ClassDef)
        for method in methods(node)
        if ast.get_docstring(method)
    }
    missing = [
        f"{name_of(file)}:{method.lineno} {node.name}.{method.name}"
        for name in sorted({name for file in PACKAGES for name in exported(file)} & set(known))
        for file, node in [known[name]]
        if isinstance(node, ast.ClassDef)
        for method in methods(node)
        if not ast.get_docstring(method) and method.name not in documented
    ]
    assert missing == []


@pytest.mark.parametrize("file", PACKAGES, ids=name_of)
def test_public_functions_are_documented(file: Path) -> None:
    for module in sorted(file.parent.glob("*.py")):
        for node in parsed(module).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name_of(module)}:{node.lineno} {node.name} has no docstring"
