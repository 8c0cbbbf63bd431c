"""What every command must have, and what `--help` must not load."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from knowstore.cli.app import app

COMMANDS = {
    "ask", "audit", "batches", "bench answers", "bench ask", "bench ceiling", "bench codecs", "bench controls",
    "bench edits", "bench layers", "bench locality", "bench methods", "bench peers", "bench rerank", "bench sequence",
    "bench speed",
    "db check", "db current", "db upgrade", "doctor", "export", "import", "ingest", "list", "models list",
    "models pull", "probes add", "probes list", "probes make", "reexpert", "remove", "replace", "report", "rollback",
    "show", "stats", "train hypernetwork", "train reader", "train reranker", "verify",
}  # fmt: skip
HEAVY = ("torch", "transformers", "lancedb", "pyarrow", "sqlalchemy", "alembic", "rich", "numpy")


def _commands(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, node
    for name, child in getattr(node, "commands", {}).items():
        yield from _commands(child, (*path, name))


ALL = dict(_commands(typer.main.get_command(app)))


def test_the_promised_commands_are_there() -> None:
    assert {" ".join(path) for path in ALL} >= COMMANDS


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_ends_with_an_example_that_the_command_line_accepts(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"])
    assert shown.exit_code == 0
    program, *arguments = shlex.split(shown.stdout.strip().splitlines()[-1])
    assert program == "knowstore"
    context = ALL[()].make_context(program, list(arguments), resilient_parsing=False)
    rest, node = [*context._protected_args, *context.args], ALL[()]
    named = []
    while hasattr(node, "commands"):
        named.append(rest[0])
        node = node.commands[rest[0]]
        rest = rest[1:]
    if not hasattr(ALL[path], "commands"):
        assert tuple(named) == path
    node.make_context(named[-1], rest, parent=context)


@pytest.mark.parametrize("path", [path for path, node in ALL.items() if not hasattr(node, "commands")], ids=" ".join)
def test_json_quiet_and_store_may_follow_the_command(path: tuple[str, ...]) -> None:
    options = {option for parameter in ALL[path].params for option in parameter.opts}
    assert {"--json", "--quiet", "--store", "--llm", "--device"} <= options


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['knowstore', '--help']\n"
        "from knowstore.cli import main\n"
        "try: main()\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == "[]"
    assert "ingest" in ran.stdout


def test_wrong_usage_is_exit_2() -> None:
    assert CliRunner().invoke(app, ["ask", "--mode", "magic", "why?"]).exit_code == 2
    assert CliRunner().invoke(app, ["aks"]).exit_code == 2


@pytest.mark.parametrize("arguments", [["ingest", "notes"], ["reexpert"], ["ask", "--questions", "notes"]])
@pytest.mark.parametrize("option", ["--workers=2", "--ray-address=here:1"])
def test_options_of_workers_are_for_the_engine_ray(arguments: list[str], option: str) -> None:
    wrong = CliRunner().invoke(app, [*arguments, option])
    assert (wrong.exit_code, "--engine ray" in wrong.output) == (2, True)


def test_workers_answer_files_of_questions_and_delete_nothing() -> None:
    assert CliRunner().invoke(app, ["ask", "why?", "--engine", "ray"]).exit_code == 2
    assert CliRunner().invoke(app, ["reexpert", "--drop-previous", "--engine", "ray"]).exit_code == 2


def test_version_is_shown() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("knowstore ")
