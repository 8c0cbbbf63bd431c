"""What every command works with: the options that are common to all, the store that they name, and the output."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .output import Output

if TYPE_CHECKING:
    from knowstore import KnowledgeStore, ModelConfig

DEFAULT_STORE = ".knowstore"


@dataclass
class Session:
    """The common options as they were given, and what `kept` says if the command is interrupted."""

    store: str = DEFAULT_STORE
    catalog: str | None = None
    models: dict[str, str] = field(default_factory=dict)
    output: Output = field(default_factory=Output)
    kept: str = "every edit batch that was committed; nothing is half done"

    @property
    def folder(self) -> Path:
        return Path(self.store)

    @property
    def is_remote(self) -> bool:
        """Whether the store is in an object store."""
        return "://" in self.store

    @property
    def location(self) -> str | Path:
        return self.store if self.is_remote else self.folder

    @property
    def has_store(self) -> bool:
        from knowstore import KnowledgeStore

        return KnowledgeStore.is_at(self.location)

    def model_config(self) -> ModelConfig:
        """The models that were named, `default` for the others."""
        from knowstore import ModelConfig

        return replace(ModelConfig(), **self.models)  # type: ignore[arg-type]

    def open(self, *, create: bool = False, **options: Any) -> KnowledgeStore:
        """The store; models that were not named are those that it was made with. `options` go to the store."""
        from knowstore import KnowledgeStore

        models = None
        if self.models:
            models = self.model_config()
            if self.has_store:
                with KnowledgeStore.open(self.location, create=False, catalog_url=self.catalog) as store:
                    models = replace(store.models.config, **self.models)  # type: ignore[arg-type]
        return KnowledgeStore.open(
            self.location,
            create=create,
            catalog_url=self.catalog,
            models=models,
            on_progress=self.output.progress,
            **options,
        )

    def may_delete(self, question: str, *, is_sure: bool) -> bool:
        """Whether to go on with what was just shown: `--yes`, or a yes at the terminal.

        Raises:
            typer.BadParameter: neither `--yes` nor a terminal to ask at.
        """
        if is_sure:
            return True
        if not is_terminal():
            raise typer.BadParameter(
                "there is no terminal to ask at, so nothing was done without it", param_hint="--yes"
            )
        if self.output.confirm(question):
            return True
        self.output.note("Nothing was changed.")
        return False


def is_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def given(**options: Any) -> dict[str, Any]:
    """The options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def source_of(store: KnowledgeStore, given_as: str) -> str:
    """The source, or the pattern of sources (PREFIX*), that a user means: as the store has it, else of the file or
    folder at this path."""
    path, star = (given_as[:-1], "*") if given_as.endswith("*") else (given_as, "")
    names = [name for name, _ in store.catalog.sources()]
    if given_as in names or (star and any(name.startswith(path) for name in names)):
        return given_as
    return Path(path).resolve().as_posix() + ("/" if path.endswith("/") else "") + star
