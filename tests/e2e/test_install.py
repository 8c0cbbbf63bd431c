"""The wheel and an editable install, each in an environment of its own, without a network."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("build") is None or importlib.util.find_spec("setuptools") is None,
    reason="extra `dev` is not installed",
)

ROOT = Path(__file__).parents[2]
PARTS = ("knowstore", "cli", "migrations", "pyproject.toml", "README.md", "LICENSE")
WHERE = """
import knowstore, knowstore.cli, knowstore._migrations
for module in (knowstore, knowstore.cli, knowstore._migrations):
    print(module.__file__)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the package is built from."""
    folder = tmp_path / "a tree"
    folder.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / part)
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of a new environment that has the libraries of this one, and no knowstore."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    library = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (library / "libraries.pth").write_text(sysconfig.get_path("purelib"))  # .pth files in there are not followed
    return folder / "bin" / "python"


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, with nothing of the repository on the path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "KNOWSTORE"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip_install(python: Path, *what: str | Path) -> None:
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=python.parent)


def test_wheel_holds_everything_and_runs_from_its_own_files(tree: Path, python: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", cwd=tree)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [file for part in ("knowstore", "cli", "migrations") for file in (tree / part).rglob("*") if file.is_file()]
    moved = {"cli": "knowstore/cli", "migrations": "knowstore/_migrations", "knowstore": "knowstore"}
    expected = {"/".join([moved[parts[0]], *parts[1:]]) for file in files if (parts := file.relative_to(tree).parts)}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "knowstore/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)

    pip_install(python, wheel)
    library, cli, migrations = map(Path, run(python, "-c", WHERE, cwd=tmp_path).splitlines())
    assert library.is_relative_to(python.parents[1])
    assert cli.parent == library.parent / "cli"
    assert migrations.parent == library.parent / "_migrations"
    assert run(python.parent / "knowstore", "--version", cwd=tmp_path).startswith("knowstore 0.")
    command = python.parent / "knowstore"
    shown = run(command, "ingest", tree / "README.md", "--dry-run", "--json", cwd=tmp_path)  # migrates a new catalog
    assert json.loads(shown)["passages_added"] > 0


def test_editable_install_runs_from_the_working_tree(tree: Path, python: Path, tmp_path: Path) -> None:
    pip_install(python, "--editable", tree)
    library, cli, migrations = map(Path, run(python, "-c", WHERE, cwd=tmp_path).splitlines())
    assert library == tree / "knowstore" / "__init__.py"
    assert cli == tree / "cli" / "__init__.py"
    assert migrations == tree / "migrations" / "__init__.py"
    assert run(python.parent / "knowstore", "--version", cwd=tmp_path).startswith("knowstore 0.")
