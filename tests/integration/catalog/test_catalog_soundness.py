"""What a catalog says of itself after somebody has changed rows by hand; errors of reading are its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from sqlalchemy import text

from knowstore.catalog import Catalog, Change
from knowstore.catalog.soundness import ROLES
from knowstore.errors import CatalogError
from knowstore.records import Asked, Probe, ProbeAnswer

A, B = "a" * 32, "b" * 32


@pytest.fixture
def audited(catalog: Catalog) -> Catalog:
    """Two passages, of which one was removed and purged, two probes, and an audit of one of them."""
    catalog.commit(catalog.stage("ingest").id, Change(added=[(A, "x"), (B, "x")]))
    catalog.commit(catalog.stage("remove").id, Change(removed=[(B, "x")]))
    catalog.record_purge(2, [B])
    fingerprints = {role: role * 9 for role in ROLES}
    for role, digest in fingerprints.items():
        catalog.fingerprint(role, digest, {"reference": "x"})
    catalog.set_settings({"models": {"llm": "x"}, "settled": 2, "purge_pending": None, "fingerprints": fingerprints})
    log = catalog.audits
    log.add_probes([Probe("Rome?", ("753 BC",), "reliability", A, 1), Probe("Faust?", (), "locality", None, 2)])
    audit = log.begin(2, "experts", {"sample": None}, [Asked(1, "current"), Asked(2, "current")])
    log.record(audit.id, [ProbeAnswer(1, "753 BC", 1.0, 1.0, 1, None, True, ((A, 0.5, 1), (A, 1, 1)))], 0.5)
    log.finish(audit.id)
    return catalog


def _sql(catalog: Catalog, statement: str) -> None:
    with catalog._database.write() as connection:
        connection.execute(text(statement))


def test_a_catalog_that_nobody_changed_by_hand_has_no_faults(audited: Catalog) -> None:
    assert audited.faults() == []


IMPOSSIBLE = {
    "UPDATE edit_batches SET kind = 'oops' WHERE id = 1": "kind of edit batch 1 is 'oops'",
    "UPDATE probes SET answers = '{\"a\": 1}' WHERE id = 1": "answers of probe 1 is",
    "UPDATE probes SET answers = '[1]' WHERE id = 1": "answers of probe 1 is",
    f"UPDATE probes SET passage_id = '{'c' * 32}' WHERE id = 1": f"probe 1 asks for passage {'c' * 32}",
    "UPDATE audits SET mode = 'oops'": "mode of audit 1 is 'oops'",
    "UPDATE audits SET options = '[]'": "options of audit 1 is",
    "UPDATE audits SET seconds = -1": "seconds of audit 1 is",
    "UPDATE audit_answers SET em = 5.0 WHERE probe_id = 1": "em of the answer to probe 1 in audit 1 is '5",
    "UPDATE audit_answers SET f1 = -1 WHERE probe_id = 1": "f1 of the answer to probe 1 in audit 1 is",
    "UPDATE audit_answers SET experts = '[[1, 2, 3]]' WHERE probe_id = 1": "experts of the answer to probe 1 in",
    "UPDATE audit_answers SET experts = NULL WHERE probe_id = 1": "the answer to probe 1 in audit 1 lacks a part",
    "INSERT INTO edit_batches (kind, state, created_at, note, n_added, n_removed, n_superseded)"
    " VALUES ('ingest', 'live', '2024-01-01 00:00:00', '', 0, 0, 0)": "edit batch 3 is live, and nothing was added",
}
UNREADABLE = {
    "UPDATE edit_batches SET created_at = 'oops' WHERE id = 1": "created_at of edit batch 1 is 'oops'",
    "UPDATE edit_batches SET committed_at = '5' WHERE id = 2": "committed_at of edit batch 2 is '5'",
    "UPDATE fingerprints SET created_at = 'oops' WHERE id = 1": "created_at of fingerprint 1 is 'oops'",
    "UPDATE probes SET answers = 'oops' WHERE id = 1": "answers of probe 1 is 'oops'",
    "UPDATE audits SET finished_at = 'oops'": "finished_at of audit 1 is 'oops'",
    "UPDATE audit_answers SET experts = 'oops' WHERE probe_id = 1": "experts of the answer to probe 1 in",
    "UPDATE settings SET value = '{' WHERE key = 'models'": "the setting `models` cannot be read",
}


@pytest.mark.parametrize("statement", [*IMPOSSIBLE, *UNREADABLE])
def test_what_cannot_be_in_a_row_is_named_and_read_with_no_other_error(audited: Catalog, statement: str) -> None:
    if statement in UNREADABLE and not audited._database.is_sqlite:
        pytest.skip("PostgreSQL refuses it")
    _sql(audited, statement)
    details = [fault.detail for fault in audited.faults() if not fault.is_mendable]
    assert [(IMPOSSIBLE | UNREADABLE)[statement] in detail for detail in details] == [True]
    log = audited.audits
    reading: list[Callable[[], object]] = [
        audited.batches, audited.models, audited.fingerprints, log.probes, log.audits, lambda: log.answers(1),
        lambda: log.scores("experts"),
    ]  # fmt: skip
    for read in reading:
        with suppress(CatalogError):
            read()


def test_a_value_that_cannot_be_read_is_an_error_that_says_what_to_do(audited: Catalog) -> None:
    _sql(audited, "UPDATE probes SET answers = '{}' WHERE id = 1")
    with pytest.raises(CatalogError, match="no list of texts") as raised:
        audited.audits.probes()
    assert "knowstore verify" in raised.value.fix


def test_a_purge_that_a_live_passage_contradicts_counts_for_nothing_and_is_taken_out(audited: Catalog) -> None:
    _sql(audited, f"INSERT INTO purges VALUES ('{A}', 2)")
    assert audited.purged([A, B]) == {B}
    assert f"passage {A} is recorded as purged with edit batch 2" in " ".join(one.detail for one in audited.faults())
    audited.mend()
    assert A not in " ".join(one.detail for one in audited.faults())
    audited.commit(audited.stage("remove").id, Change(removed=[(A, "x")]))
    assert audited.purged([A, B]) == {B}
