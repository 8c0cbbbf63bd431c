"""Benches that go on where they were cut short: what a run is made with stands beside its results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from knowstore.errors import ConfigError


def keep_run(file: Path, settings: Mapping[str, object], digest: str, *, is_begun: bool) -> None:
    """Write what is run into `file`, or refuse to go on with a run of something else.

    Args:
        settings: what JSON can hold of how it is run.
        digest: tells its data from others.
        is_begun: whether there are results in the file's folder already.

    Raises:
        ConfigError: the results are not known to be of this run; they stay.
    """
    wanted = json.loads(json.dumps({"config": settings, "digest": digest}))
    if not is_begun:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted, indent=1) + "\n", "utf-8")
        return
    try:
        kept = json.loads(file.read_text("utf-8"))
        pairs = {name: (kept["config"].get(name), value) for name, value in wanted["config"].items()}
        is_of_same_files = kept["digest"] == digest
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _another_run(file.parent, f"{file.name} beside it cannot be read: {error}") from error
    if other := [f"{name} is {one}, not {value}" for name, (one, value) in pairs.items() if one != value]:
        raise _another_run(file.parent, "; ".join(other))
    if not is_of_same_files:
        raise _another_run(file.parent, "its files held something else")


def _another_run(folder: Path, why: str) -> ConfigError:
    return ConfigError(
        f"the run in {folder} is not known to be this one: {why}",
        kept="that run is as it was",
        fix="give its options and files to go on with it, or another folder",
    )
