"""A store in an object store, on a real S3 server: whatever a folder's can do, and what it needs beside."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from knowstore.bank import ExpertBank
from knowstore.cli.app import app
from knowstore.config import RetrievalConfig
from knowstore.errors import CatalogError, ConfigError, UnknownPassageError
from knowstore.records import Passage
from knowstore.store import KnowledgeStore
from tests.s3 import objects

if TYPE_CHECKING:
    from knowstore.config import ModelConfig

Open = Callable[[], KnowledgeStore]
Write = Callable[[str, Sequence[Passage]], str]
Look = Callable[[KnowledgeStore], object]


@pytest.fixture
def url(s3_url: str) -> str:
    """Where a store may be made."""
    return f"{s3_url}/stores/{uuid.uuid4().hex}"


@pytest.fixture
def open_bucket(url: str, tmp_path: Path, tiny_models: ModelConfig, cache_dir: Path) -> Iterator[Open]:
    """Opens the store of the test, of the tiny models, with its catalog in a file."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(
            KnowledgeStore.open(
                url,
                catalog_url=f"sqlite:///{tmp_path}/catalog.sqlite",
                models=tiny_models,
                cache_dir=cache_dir,
                retrieval=replace(RetrievalConfig(), null_threshold=None),
            )
        )


def test_it_lives_as_one_in_a_folder_does(
    open_bucket: Open,
    open_store: Callable[..., KnowledgeStore],
    write_facts: Write,
    facts: list[Passage],
    visible: Look,
) -> None:
    stores = [open_bucket(), open_store()]
    for store in stores:
        store.ingest([write_facts("facts.jsonl", facts)])
        store.ingest([write_facts("facts.jsonl", facts[:4])])
        store.remove([facts[0].passage_id])
    assert visible(stores[0]) == visible(stores[1])
    assert visible(open_bucket()) == visible(stores[1])
    for store in stores:
        store.rollback(2)
    assert visible(stores[0]) == visible(stores[1])
    assert stores[0].verify().problems == ()
    sizes = stores[0].stats().bytes
    assert (sizes["passages"] > 0, sizes["experts"] > 0, sizes["catalog"]) == (True, True, 0)


def test_a_purge_leaves_no_object_with_a_byte_of_it(open_bucket: Open, url: str, facts: list[Passage]) -> None:
    store = open_bucket()
    store.add(facts)
    prefix, needle = url.split("/", 3)[3], b"slopes of Pichincha"
    assert any(needle in data for key, data in objects().items() if key.startswith(prefix))
    store.remove([facts[5].passage_id], purge=True)
    there = {key: data for key, data in objects().items() if key.startswith(prefix)}
    assert there
    assert [key for key, data in there.items() if needle in data] == []
    assert (len(store.passages()), store.verify().problems) == (5, ())


def test_a_first_ingest_that_crashed_can_be_run_again(
    open_bucket: Open, write_facts: Write, facts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    path, store = write_facts("facts.jsonl", facts), open_bucket()
    with monkeypatch.context() as patch:
        patch.setattr(ExpertBank, "add", crash)
        with pytest.raises(KeyboardInterrupt):
            store.ingest([path])
    store.close()
    store = open_bucket()
    assert store.passages() == []
    with pytest.raises(UnknownPassageError):
        store.remove([facts[0].passage_id])  # discards what the ingest left
    assert store.ingest([path]).passages_added == 6
    assert store.verify().problems == ()


def test_it_needs_a_catalog_of_its_own_elsewhere(
    url: str, tmp_path: Path, open_bucket: Open, facts: list[Passage]
) -> None:
    with pytest.raises(ConfigError, match="must have its catalog elsewhere"):
        KnowledgeStore.open(url)
    assert not KnowledgeStore.is_at(url)
    with pytest.raises(ConfigError, match="there is no store"):
        KnowledgeStore.open(url, create=False, catalog_url=f"sqlite:///{tmp_path}/catalog.sqlite")
    open_bucket().add(facts[:1])
    assert KnowledgeStore.is_at(url)
    with pytest.raises(CatalogError, match="the catalog is empty, the tables in s3://"):
        KnowledgeStore.open(url, catalog_url=f"sqlite:///{tmp_path}/other.sqlite")


@pytest.mark.parametrize(
    "location", ["s3://bucket", "http://host/kb", "s3://key:secret@bucket/kb", "s3://bucket/kb?x=1"]
)
def test_other_urls_are_no_places_for_a_store(location: str) -> None:
    with pytest.raises(ConfigError, match="is no place for a store"):
        KnowledgeStore.open(location, catalog_url="sqlite:///unused.sqlite")


def test_an_object_store_that_is_not_there_is_an_error_that_says_what_to_set(s3_url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used") as raised:
        KnowledgeStore.open(f"{s3_url}-other/kb", catalog_url=f"sqlite:///{tmp_path}/catalog.sqlite")
    assert "AWS_ENDPOINT_URL" in raised.value.fix


def test_commands_take_the_url_as_the_store(open_bucket: Open, url: str, tmp_path: Path, facts: list[Passage]) -> None:
    open_bucket().add(facts)
    common = ["--store", url, "--catalog", f"sqlite:///{tmp_path}/catalog.sqlite"]
    listed = CliRunner().invoke(app, [*common, "list", "--quiet"])
    assert sorted(listed.stdout.split()) == sorted(passage.passage_id for passage in facts)
    without = CliRunner().invoke(app, ["--store", url, "db", "current"])
    assert (without.exit_code, "--catalog" in without.stderr) == (2, True)
