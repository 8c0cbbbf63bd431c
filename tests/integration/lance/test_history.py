"""Old versions of a table, when the clock was set back since they were written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import lancedb
import pytest

from knowstore.errors import PassageError
from knowstore.lance import delete_history

_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = ((__typeof__(clock_gettime) *)dlsym(RTLD_NEXT, "clock_gettime"))(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += atol(getenv("AHEAD_S"));
    return failed;
}
"""
_WRITE = """
import sys, lancedb
table = lancedb.connect(sys.argv[1]).create_table("notes", [{"id": "a"}])
table.add([{"id": "b"}])
"""


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library which puts the clock of a program that loads it ahead by AHEAD_S seconds."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to put a program's clock ahead")
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library, "-ldl"]
    subprocess.run(command, input=_CLOCK, text=True, check=True)
    return library


def written_ahead(folder: Path, clock: Path, seconds: int) -> lancedb.table.LanceTable:
    surroundings = os.environ | {"LD_PRELOAD": str(clock), "AHEAD_S": str(seconds)}
    subprocess.run([sys.executable, "-c", _WRITE, folder], env=surroundings, check=True)
    table = lancedb.connect(folder).open_table("notes")
    table.add([{"id": "c"}])
    return table


def test_versions_of_a_moment_ahead_are_waited_for(tmp_path: Path, clock: Path) -> None:
    table = written_ahead(tmp_path, clock, 4)

    delete_history(table, PassageError)

    assert len(table.list_versions()) == 1
    assert sorted(row["id"] for row in table.search().to_list()) == ["a", "b", "c"]


def test_versions_of_another_day_are_said_to_be_ahead(tmp_path: Path, clock: Path) -> None:
    table = written_ahead(tmp_path, clock, 86_400)
    newest = max(version["timestamp"] for version in table.list_versions())
    assert newest > datetime.now()

    with pytest.raises(PassageError) as raised:
        delete_history(table, PassageError)

    assert newest.isoformat(" ", "seconds") in raised.value.what
    assert "clock" in raised.value.fix
    assert table.count_rows() == 3
