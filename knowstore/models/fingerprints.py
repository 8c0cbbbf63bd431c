"""Digests of model files, remembered in the cache so that a start does not read every byte again."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from knowstore.errors import ModelNotFoundError
from knowstore.models.files import default_cache_dir, read_marker, write_atomically

_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZER = ("tokenizer.json", "vocab.*", "merges.txt", "*.model")
_POOLING = ("modules.json", "1_Pooling/config.json")
_VOLATILE_KEYS = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version", "notes"})


def file_digest(path: Path, *, cache_dir: Path | None = None) -> str:
    """SHA-256 of a file's bytes as 64 hex digits; read again only when its size or time changed."""
    path = path.resolve()
    status = path.stat()
    known = (
        (cache_dir or default_cache_dir()) / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    )
    state = [status.st_size, status.st_mtime_ns]
    try:
        entry = json.loads(known.read_text(encoding="utf-8"))
        if entry["state"] == state:
            return str(entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never digested, or an entry that cannot be read: digest it now
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):  # where the cache cannot be written it is only slower next time
        write_atomically(known, json.dumps({"state": state, "sha256": digest}))
    return digest


def directory_fingerprint(path: Path, *, cache_dir: Path | None = None) -> str:
    """What identifies the model in a directory, as 64 hex digits.

    Covers the weights, the configuration without what changes from one version of transformers to the
    next and without its makers' notes, the tokenizer's vocabulary, and pooling. A directory converted from
    GGUF is identified by its GGUF file, so that every machine's conversion has the same fingerprint.

    Raises:
        ModelNotFoundError: the directory has no weights or no configuration.
    """
    marker = read_marker(path)
    if marker is not None:
        return hashlib.sha256(f"gguf {marker.gguf_sha256}".encode()).hexdigest()
    weights = sorted(file for pattern in _WEIGHTS for file in path.glob(pattern))
    config = path / "config.json"
    if not weights or not config.is_file():
        raise ModelNotFoundError(
            f"{path} has no {'config.json' if weights else 'weights (*.safetensors)'}",
            kept="nothing was loaded",
            fix="give a directory as `save_pretrained` writes it",
        )
    others = sorted(file for pattern in (*_TOKENIZER, *_POOLING) for file in path.glob(pattern))
    digests = [(file.relative_to(path).as_posix(), file_digest(file, cache_dir=cache_dir)) for file in weights + others]
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelNotFoundError(
            f"{config} is not JSON: {error}",
            kept="nothing was loaded",
            fix="fetch the model again, the file is damaged",
        ) from error
    settings = {key: value for key, value in settings.items() if key not in _VOLATILE_KEYS}
    return hashlib.sha256(json.dumps([digests, settings], sort_keys=True).encode()).hexdigest()
