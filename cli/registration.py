"""Registering commands: the options common to all of them, and the one error boundary."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer

from knowstore.config import Device, Dtype
from knowstore.errors import KnowledgeStoreError

from .output import Output, Progress
from .session import DEFAULT_STORE, Session

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 141
_MODEL_OPTIONS = ("llm", "retriever", "reranker", "hypernetwork", "reader", "device", "dtype")


def _version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        typer.echo(f"knowstore {version('knowstore')}")
        raise typer.Exit


def _common(name: str, annotation: Any, description: str, *, envvar: str | None, hidden: bool) -> inspect.Parameter:
    option = typer.Option(f"--{name}", help=description, envvar=envvar, show_envvar=envvar is not None, hidden=hidden)
    default = False if annotation is bool else None
    name = {"json": "as_json", "quiet": "is_quiet"}.get(name, name)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
    )


def _common_options(*, on_command: bool) -> list[inspect.Parameter]:
    """Options that stand before or after the command's name; the environment is read before it."""
    where: tuple[tuple[str, Any, str, str], ...] = (
        ("store", str | None, f"The store's directory, {DEFAULT_STORE} if not given.", "KNOWSTORE_STORE"),
        ("catalog", str | None, "URL of the catalog's database, else SQLite in the store.", "KNOWSTORE_CATALOG"),
        ("llm", str | None, "Language model: a directory, a GGUF file or a hub id.", "KNOWSTORE_LLM"),
        ("retriever", str | None, "Retriever: a directory or a hub id.", "KNOWSTORE_RETRIEVER"),
        ("reranker", str | None, "Reranker: a directory, a hub id, or `late`.", "KNOWSTORE_RERANKER"),
        (
            "hypernetwork",
            str | None,
            "Hypernetwork: a directory or the name of a shipped one.",
            "KNOWSTORE_HYPERNETWORK",
        ),
        ("reader", str | None, "What reads passages in prompts: a directory, or `none`.", "KNOWSTORE_READER"),
        ("device", Device | None, "Where models run.", "KNOWSTORE_DEVICE"),
        ("dtype", Dtype | None, "Precision of the frozen models.", "KNOWSTORE_DTYPE"),
        ("json", bool, "Write one JSON object to stdout and nothing else there.", ""),
        ("quiet", bool, "Write ids or the bare answer only; no hints, no progress.", ""),
    )
    return [
        _common(
            name,
            annotation,
            description,
            envvar=None if on_command else envvar or None,
            hidden=on_command and name in (*_MODEL_OPTIONS, "catalog"),
        )
        for name, annotation, description, envvar in where
    ]


def _apply(session: Session, values: dict[str, Any]) -> None:
    """Take the common options out of `values` into the session; what comes later wins."""
    session.store = values.pop("store") or session.store
    session.catalog = values.pop("catalog") or session.catalog
    session.models |= {name: value for name in _MODEL_OPTIONS if (value := values.pop(name)) is not None}
    old = session.output
    as_json, is_quiet = values.pop("as_json") or old.as_json, values.pop("is_quiet") or old.is_quiet
    session.output = Output(as_json=as_json, is_quiet=is_quiet)
    session.output.progress = Progress(is_shown=not is_quiet)


def _with_options(function: Callable[..., None], own: list[inspect.Parameter], *, on_command: bool) -> None:
    """Give a function the signature that typer reads: the context, its own options, the common ones."""
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    signature = inspect.Signature([context, *own, *_common_options(on_command=on_command)])
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}


def group(name: str, description: str, example: str) -> typer.Typer:
    """A group of commands, such as `knowstore db`."""
    commands = _new_typer(description, example)
    app.add_typer(commands, name=name)
    return commands


def command(commands: typer.Typer, *, example: str, name: str | None = None) -> Callable[[Callable[..., None]], Any]:
    """Register `function(session, ...)` as a command whose help ends with `example`.

    The function's annotations are typer's. The command takes the common options too and runs inside
    the error boundary.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, context: typer.Context, **values: Any) -> None:
            session: Session = context.obj
            _apply(session, values)
            _bounded(session, lambda: function(session, **values))

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        _with_options(run, own, on_command=True)
        del run.__wrapped__
        commands.command(name, epilog=_example(example))(run)
        return function

    return register


def _bounded(session: Session, run: Callable[[], None]) -> None:
    """The one error boundary: every failure becomes what happened, what was kept and what to do."""
    output = session.output
    try:
        run()
        sys.stdout.flush()
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise  # how a command ends by itself
    except KnowledgeStoreError as error:
        _fail(output, error, error, EXIT_ERROR)
    except KeyboardInterrupt as error:
        _fail(
            output,
            error,
            KnowledgeStoreError("interrupted", session.kept, "run the same command again"),
            EXIT_INTERRUPTED,
        )
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # so that the interpreter's own last flush is quiet too
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_BROKEN_PIPE) from None
    except OSError as error:
        fix = "check the disk's free space and the permissions, then run the same command again"
        _fail(output, error, KnowledgeStoreError(f"{type(error).__name__}: {error}", session.kept, fix), EXIT_ERROR)
    except Exception as error:
        fix = "this is a fault in knowstore: run it again with KNOWSTORE_DEBUG=1 and report what that prints"
        _fail(output, error, KnowledgeStoreError(f"{type(error).__name__}: {error}", session.kept, fix), EXIT_ERROR)
    finally:
        output.progress.stop()


def _fail(output: Output, cause: BaseException, error: KnowledgeStoreError, status: int) -> None:
    if os.environ.get("KNOWSTORE_DEBUG") == "1":
        output.traceback(cause)
    output.error(error)
    raise typer.Exit(status) from cause


def _example(line: str) -> str:
    return f"\b\nExample:\n  {line}"


def _new_typer(description: str, example: str) -> typer.Typer:
    return typer.Typer(
        help=description,
        epilog=_example(example),
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _start(*, context: typer.Context, **values: Any) -> None:
    values.pop("version")
    context.obj = Session()
    _apply(context.obj, values)


app = _new_typer(
    "A continual knowledge store for a frozen language model: every passage becomes an expert that is mounted "
    "when a question needs it.",
    "knowstore ingest README.md",
)
_version_option = typer.Option("--version", help="Show the version and leave.", callback=_version, is_eager=True)
_with_options(
    _start,
    [
        inspect.Parameter(
            "version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, _version_option]
        )
    ],
    on_command=False,
)
app.callback()(_start)
