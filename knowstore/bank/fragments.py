"""Experts written by many processes at once: each writes files beside the bank's, one process commits them.

A file of the bank that no version of the table names is nothing to a reader. `write_fragment` makes such files, in
any process that reaches the bank's place; `ExpertBank.commit_fragments` makes them a part of the bank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pyarrow as pa

from knowstore.bank.expert import EncodedExpert
from knowstore.bank.rows import to_arrow
from knowstore.errors import BankError, ConfigError

_EVER = timedelta(days=36_500)  # older than any version, so that all of them stay


def write_fragment(uri: str, name: str, experts: Iterable[EncodedExpert]) -> list[str]:
    """Write experts to files of a bank without making them a part of it.

    Args:
        uri: where LanceDB keeps the bank's table.
        name: of the table; it must be there.
        experts: at least one, each of another passage.

    Returns: descriptions in JSON that `ExpertBank.commit_fragments` takes.

    Raises:
        BankError: no bank there, or a failed write.
        ConfigError: pylance is not installed.
    """
    lance, table = _lance(), f"{uri}/{name}.lance"
    try:
        version = lance.dataset(table).data_storage_version
        made = lance.fragment.write_fragments(
            to_arrow(list(experts)), table, mode="append", data_storage_version=version
        )
    except (RuntimeError, ValueError, OSError, pa.ArrowException) as error:
        raise BankError(
            f"experts could not be written beside the bank in {table}: {error}",
            kept="the bank is as it was",
            fix="see that every worker reaches the store at this very place, and can write there",
        ) from error
    return [json.dumps(fragment.to_json()) for fragment in made]


def commit(uri: str, name: str, fragments: Sequence[str]) -> None:
    """Make fragments a part of a bank, in one version of its table.

    Raises:
        OSError: a file of theirs is not there, or not whole; other errors are LanceDB's.
    """
    lance, table = _lance(), f"{uri}/{name}.lance"
    made = [lance.FragmentMetadata.from_json(fragment) for fragment in fragments]
    if "://" not in uri:  # a worker of another machine may have written into a folder of the same name there
        for file in (file for fragment in made for file in fragment.files):
            path = Path(table) / "data" / file.path
            if not path.is_file() or path.stat().st_size != file.file_size_bytes:
                raise FileNotFoundError(f"{path} is not as a worker wrote it: do all of them see this folder?")
    dataset = lance.dataset(table)
    lance.LanceDataset.commit(dataset, lance.LanceOperation.Append(made), read_version=dataset.version)


def sweep(uri: str, name: str) -> None:
    """Delete files that no version of a bank's table names; nobody may be writing them."""
    _lance().dataset(f"{uri}/{name}.lance").cleanup_old_versions(
        older_than=_EVER, delete_unverified=True, error_if_tagged_old_versions=False
    )


def _lance() -> ModuleType:
    try:
        import_module("lance.fragment")
        return import_module("lance")
    except ImportError as error:
        raise ConfigError(
            "pylance is not installed, by which many processes write experts",
            kept="nothing was written",
            fix="run `pip install 'knowstore[ray]'`",
        ) from error
