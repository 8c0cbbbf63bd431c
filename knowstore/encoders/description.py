"""What a model's folder says of itself, in a file that somebody else may have made."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

_MAX_BYTES = 1 << 20


def read_description(path: Path) -> Any:
    """What the JSON of a `config.json` holds.

    Raises:
        ValueError: not a regular file, which may never end, more than 1 MiB, or no JSON.
        OSError: there is none, or it may not be read.
        RecursionError: it is nested too deeply.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    if status.st_size > _MAX_BYTES:
        raise ValueError(f"{path.name} is larger than {_MAX_BYTES:,} bytes")
    return json.loads(path.read_text("utf-8"))
