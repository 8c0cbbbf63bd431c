"""Changing over to another hypernetwork or LLM: a second bank beside the one in use, and one commit between them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import cast

from knowstore._encoding import Engine
from knowstore._ingest import counted, stored_batches
from knowstore._layout import Layout
from knowstore._loaded import LoadedModels, OnProgress
from knowstore._tables import bank_name
from knowstore._upkeep import intervals
from knowstore.bank import NAME, ExpertBank, bank_names
from knowstore.catalog import Catalog
from knowstore.config import Codec, ModelConfig
from knowstore.errors import ConfigError, PassageError
from knowstore.passages import PassageTable
from knowstore.records import KeptBank, ReexpertReport

Recorded = Mapping[str, str]
_PREVIOUS = "previous_models"
_MADE_BY = ("hypernetwork", "llm")


def previous_models(catalog: Catalog, like: LoadedModels) -> LoadedModels:
    """The models that the store had before its last change, with the settings of `like`.

    Raises:
        ConfigError: there was no change, it has been undone, or the files of those models are others now.
    """
    previous = catalog.setting(_PREVIOUS)
    if not isinstance(previous, dict):
        raise ConfigError(
            "the store has had no other hypernetwork or LLM",
            kept="the store is as it was",
            fix="nothing needs to be undone",
        )
    if previous.get("is_undone"):
        raise ConfigError(
            "the last change of hypernetwork or LLM has been undone already",
            kept="the store is as it was",
            fix="nothing needs to be done; to go over again run `knowstore --hypernetwork FOLDER reexpert`",
        )
    models = like.with_config(ModelConfig(**previous["models"]))
    models.check_store(previous["fingerprints"])
    return models


def reexpert(
    layout: Layout,
    catalog: Catalog,
    table: PassageTable,
    models: LoadedModels,
    engine: Engine,
    codec: Codec,
    on_progress: OnProgress | None,
    *,
    is_undone: bool,
) -> ReexpertReport:
    """Generate the experts of all stored passages by `models`, which `engine` runs, then let the store use them; see
    `KnowledgeStore.reexpert`. The caller is the one writer, and asks with `is_undone` for the previous models."""
    started = time.perf_counter()
    recorded, new = _recorded(catalog), models.fingerprints
    if new["retriever"] != recorded["retriever"]:
        raise ConfigError(
            "the store was made with another retriever, whose vectors a change of experts leaves as they are",
            kept="the store is as it was",
            fix="name the retriever that it was made with, or ingest into a new store",
        )
    if new["experts"] == recorded["experts"]:
        return ReexpertReport(new["experts"], new["experts"], 0, 0, time.perf_counter() - started)
    models.check_trained()
    kept = models.kept_config()
    name = _name_for(catalog, new["experts"])
    bank = ExpertBank.open(str(layout.tables), fingerprint=new["experts"], name=name, create=True)
    n_generated, n_reused = _fill(bank, table, engine, codec, catalog.head(), on_progress)
    for role, digest in new.items():
        catalog.fingerprint(role, digest, {"reference": str(getattr(kept, role, role))})
    catalog.set_settings(
        {
            _PREVIOUS: {
                "models": catalog.setting("models"),
                "fingerprints": dict(recorded),
                "is_undone": is_undone,
            },
            "models": asdict(kept),
            "fingerprints": {**new, "bank": name},
        }
    )
    seconds = time.perf_counter() - started
    return ReexpertReport(new["experts"], recorded["experts"], n_generated, n_reused, seconds)


def others(layout: Layout, catalog: Catalog) -> list[KeptBank]:
    """Every bank but the one in use; none while the store holds no passage."""
    recorded, previous = catalog.setting("fingerprints"), catalog.setting(_PREVIOUS)
    if not isinstance(recorded, dict):
        return []
    models = {bank_name(previous["fingerprints"]): previous["models"]} if isinstance(previous, dict) else {}
    return [
        KeptBank(name, layout.table_bytes(name), *(str(models.get(name, {}).get(role, "")) for role in _MADE_BY))
        for name in bank_names(str(layout.tables))
        if name != bank_name(recorded)
    ]


def drop_others(layout: Layout, catalog: Catalog) -> int:
    """Delete every bank but the one in use; returns how many. What was before cannot be undone then."""
    dropped = others(layout, catalog)
    catalog.set_setting(_PREVIOUS, None)
    for bank in dropped:
        layout.drop_bank(bank.name)
    return len(dropped)


def _recorded(catalog: Catalog) -> Recorded:
    recorded = catalog.setting("fingerprints")
    if not isinstance(recorded, dict):
        raise PassageError(
            "the store holds no passage yet, so it has no experts",
            kept="the store is as it was",
            fix="ingest something with the models that you want",
        )
    return cast(Recorded, recorded)


def _name_for(catalog: Catalog, fingerprint: str) -> str:
    """The bank of a fingerprint: that of the previous models when it is theirs, else one named after it."""
    previous = catalog.setting(_PREVIOUS)
    if isinstance(previous, dict) and previous["fingerprints"]["experts"] == fingerprint:
        return bank_name(previous["fingerprints"])
    return f"{NAME}_{fingerprint}"


def _fill(
    bank: ExpertBank,
    table: PassageTable,
    engine: Engine,
    codec: Codec,
    head: int,
    on_progress: OnProgress | None,
) -> tuple[int, int]:
    """Make what is missing in the bank, take out what has no passage; how many were made, how many were there."""
    stored = {passage_id for passage_id, _, _ in intervals(table)}
    there = bank.ids()
    damaged = {passage_id for passage_id, _ in bank.verify()}
    bank.delete((there - stored) | damaged)
    missing = sorted(stored - (there - damaged))
    if missing:
        on_done = counted(on_progress, "generating experts", len(missing))
        engine.remake(stored_batches(table, missing), bank, codec, head, on_done)
    bank.optimize()
    return len(missing), len(stored) - len(missing)
