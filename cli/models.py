"""`knowstore models`: what each model reference stands for, and bringing models here."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from knowstore.errors import KnowledgeStoreError

from .database import open_catalog
from .output import size
from .registration import command, group
from .session import Session

if TYPE_CHECKING:
    from knowstore import ModelConfig
    from knowstore.models import ResolvedModel, UnresolvedModel

Role = Literal["llm", "retriever", "reranker", "hypernetwork", "reader"]
models = group("models", "The language model, retriever, reranker, hypernetwork and reader.", "knowstore models list")


@command(models, name="list", example="knowstore models list")
def list_models(session: Session) -> None:
    """Show what each model resolves to on this machine, with sizes and licences; fetches nothing."""
    rows = [record(model) for model in listed(session)]
    for row in rows if session.output.is_plain else []:
        row["size"] = size(row["size_bytes"]) if row["size_bytes"] is not None else None
    columns = ["role", "reference", "name", "state", "size", "licence", "path"]
    session.output.listing("models", rows, columns, id_column="name")
    for row in rows:
        if row["notes"]:
            session.output.note(f"{row['role']}: {row['notes']}")
        if row["fix"]:
            session.output.hint(f"{row['role']}: {row['fix']}")


@command(models, example="knowstore models pull")
def pull(
    session: Session,
    reference: Annotated[str | None, typer.Argument(help="A hub id; the defaults if not given.")] = None,
    role: Annotated[Role, typer.Option(help="What the model is for.")] = "llm",
) -> None:
    """Bring the default models, or one from the hub, to this machine and make them ready to load."""
    from knowstore.models import pull, pull_defaults, resolve

    session.kept = "models that were fetched whole"
    progress = session.output.progress
    if reference is None:
        found = [resolve(one.reference, one.role, progress=progress) for one in pull_defaults(progress=progress)]
    else:
        found = [pull(reference, role, progress=progress)]
    rows = [record(model) for model in found]
    session.output.listing("models", rows, ["role", "name", "state", "path"], id_column="name")


def listed(session: Session) -> list[ResolvedModel | UnresolvedModel]:
    """What the models of this session stand for: those that were named, else the store's, else the default ones."""
    from knowstore.models import ROLES, listing

    config = models_in_use(session)
    return listing({role: getattr(config, role) for role in ROLES})


def models_in_use(session: Session) -> ModelConfig:
    """The models that were named, else those that the store's catalog records, else the default ones; opens no store,
    for that would mend and migrate it."""
    try:
        if session.is_remote and session.catalog is None:
            return session.model_config()
        with open_catalog(session) as catalog:
            return replace(catalog.models(), **session.models)  # type: ignore[arg-type]
    except KnowledgeStoreError:  # `doctor` says of the store what is wrong with it
        return session.model_config()


def record(model: ResolvedModel | UnresolvedModel) -> dict[str, Any]:
    """A model as `--json` writes it."""
    from knowstore.models import UnresolvedModel

    row: dict[str, Any] = {"role": model.role, "reference": model.reference}
    if isinstance(model, UnresolvedModel):
        nothing = dict.fromkeys(("name", "origin", "size_bytes", "licence", "path", "notes"))
        return {**row, "state": f"missing: {model.problem.what}", "fix": model.problem.fix, **nothing}
    return {
        **row,
        "state": "is converted when first used" if model.needs_conversion else "ready",
        "fix": None,
        "name": model.name,
        "origin": model.origin,
        "size_bytes": model.size_bytes,
        "licence": model.licence,
        "path": str(model.path),
        "notes": _notes(model) if model.role in ("hypernetwork", "reranker", "reader") else None,
    }


def _notes(model: ResolvedModel) -> str | None:
    """How a hypernetwork, a reranker or a reader was made, as its config says."""
    try:
        notes = json.loads((model.path / "config.json").read_text(encoding="utf-8")).get("notes")
    except (OSError, ValueError, AttributeError):
        return None
    return str(notes) if notes else None
