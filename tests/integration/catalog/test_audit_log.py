"""Probes and audits in the catalog: kept as they come, taken up again, and forgotten with what was purged."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from importlib import resources
from pathlib import Path
from unittest.mock import Mock

import pytest
from alembic import command
from alembic.config import Config

from knowstore.catalog import Catalog, Change
from knowstore.catalog.database import Database
from knowstore.errors import CatalogError
from knowstore.records import Asked, Probe, ProbeAnswer

A, B = "a" * 32, "b" * 32
PROBES = (
    Probe("When was Rome founded?", ("753 BC", "in 753 BC"), "reliability", A, 1),
    Probe("Where does Łódź lie?", ("in Poland",), "paraphrase", B, 1),
    Probe("Who wrote Faust?", (), "locality", None, 1),
)


def answer(probe_id: int, text: str, *passages: str, em: float = 0.0) -> ProbeAnswer:
    experts = tuple((passage_id, 1 / len(passages), 1) for passage_id in passages)
    return ProbeAnswer(probe_id, text, em, em, 1 if passages else None, None, bool(passages), experts, "bare")


@pytest.fixture
def probed(catalog: Catalog) -> Catalog:
    """One batch of two passages, with three probes."""
    catalog.commit(catalog.stage("ingest").id, Change(added=[(A, "x"), (B, "x")]))
    assert catalog.audits.add_probes(PROBES) == 3
    return catalog


def test_a_catalog_of_the_first_schema_is_brought_up_to_date_with_what_it_holds(new_url: Callable[[], str]) -> None:
    url = new_url()
    if url.startswith("sqlite"):
        Path(url.removeprefix("sqlite:///")).touch()
    database, config = Database(url), Config()
    config.set_main_option("script_location", str(resources.files("knowstore._migrations")))
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    with Catalog.open(url, migrate=False) as old:
        assert old.schema_current() == "0001"
        assert old.check()
        old.commit(old.stage("ingest", "first").id, Change(added=[(A, "x")]))
    with Catalog.open(url) as catalog:
        assert (catalog.schema_current(), catalog.check()) == (catalog.schema_head(), [])
        assert ([batch.note for batch in catalog.batches()], catalog.live_ids()) == (["first"], {A})
        assert catalog.audits.add_probes(PROBES) == 3
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
    database.close()
    with Catalog.open(url, migrate=False) as old:
        assert (old.schema_current(), old.live_ids()) == ("0001", {A})


def test_probes_are_kept_once_as_they_were_given(probed: Catalog) -> None:
    found = probed.audits.probes()
    assert [(one.question, one.answers, one.kind, one.passage_id, one.batch_id) for one in found] == [
        (one.question, one.answers, one.kind, one.passage_id, one.batch_id) for one in PROBES
    ]
    assert probed.audits.add_probes([PROBES[0], PROBES[0]]) == 0
    other = Probe(PROBES[0].question, ("754 BC",), "reliability", A, 1)
    assert probed.audits.add_probes([other, other]) == 1


def test_an_audit_knows_what_it_has_still_to_ask(probed: Catalog, url: str) -> None:
    log = probed.audits
    asked = [Asked(1, "contested", 2), Asked(2, "current"), Asked(3, "gone")]
    audit = log.begin(1, "experts", {"sample": None}, asked)
    log.record(audit.id, [answer(2, "in Poland", A, B, em=1.0)], 0.5)
    with Catalog.open(url) as other:
        assert other.audits.unanswered(audit.id) == [asked[0], asked[2]]
        assert [one.id for one in other.audits.audits(finished=False)] == [audit.id]
        assert other.audits.scores("experts") == []
        other.audits.record(audit.id, [answer(1, ""), answer(3, "Goethe")], 0.25)
        done = other.audits.finish(audit.id)
    assert (done.seconds, done.options, done.finished_at is None) == (0.75, {"sample": None}, False)
    found = log.answers(audit.id)
    assert [(one.text, one.state, one.contested_by) for one in found] == [
        ("", "contested", 2), ("in Poland", "current", None), ("Goethe", "gone", None),
    ]  # fmt: skip
    assert {one.untouched for one in found} == {"bare"}
    assert found[1].experts == ((A, 0.5, 1), (B, 0.5, 1))
    assert [(one.probe_id, one.after, one.em) for one in log.scores("experts")] == [(1, 1, 0), (2, 1, 1), (3, 1, 0)]
    assert log.scores("rag") == []
    with pytest.raises(CatalogError, match="no audit 9"):
        log.audit(9)


def test_the_untouched_model_is_asked_once(probed: Catalog) -> None:
    probed.audits.add_untouched([("k" * 32, "Who wrote Faust?", "Goethe")])
    probed.audits.add_untouched([("k" * 32, "Who wrote Faust?", "another"), ("l" * 32, "Who?", "me")])
    assert probed.audits.untouched(["k" * 32, "m" * 32]) == {"k" * 32: "Goethe"}


def test_what_is_purged_is_in_no_probe_and_no_answer(probed: Catalog) -> None:
    log = probed.audits
    log.add_untouched([("k" * 32, PROBES[0].question, "long ago")])
    audit = log.begin(1, "experts", {}, [Asked(1, "current"), Asked(2, "contested", 1), Asked(3, "current")])
    log.record(
        audit.id, [answer(1, "753 BC", A, em=1.0), answer(2, "753 BC", B, A), answer(3, "Goethe", B, em=1.0)], 1.0
    )
    log.finish(audit.id)
    log.forget([A])
    assert [one.question for one in log.probes()] == [one.question for one in PROBES[1:]]
    assert [(one.probe_id, one.text, one.contested_by) for one in log.answers(audit.id)] == [
        (2, None, None), (3, "Goethe", None),
    ]  # fmt: skip
    assert log.untouched(["k" * 32]) == {}


def test_a_log_that_cannot_be_wiped_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Database(tmp_path / "catalog.sqlite")) as database:
        failing = Mock(**{"cursor.return_value.execute.side_effect": sqlite3.OperationalError("disk I/O error")})
        monkeypatch.setattr(database.engine, "raw_connection", lambda: failing)
        with pytest.raises(CatalogError, match="disk I/O error"):
            database.wipe()
