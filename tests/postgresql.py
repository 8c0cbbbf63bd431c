"""A PostgreSQL server of our own on a free loopback port, with its data in a folder that goes away."""

from __future__ import annotations

import getpass
import glob
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PASSWORD = "s3cret-word"


class NoServerError(Exception):
    """PostgreSQL is not installed here, or does not start; says why."""


def _server_programs() -> Path | None:
    """The folder of initdb and pg_ctl; Debian keeps it off the PATH."""
    on_path = shutil.which("pg_ctl")
    folders = [
        *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True),
        *([os.path.dirname(on_path)] if on_path else []),
    ]
    return next((Path(folder) for folder in folders if os.access(os.path.join(folder, "initdb"), os.X_OK)), None)


def _server_account() -> str | None:
    """Who the server runs as: it refuses root."""
    if os.geteuid() != 0:
        return getpass.getuser()
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


@contextmanager
def postgresql_server() -> Iterator[str]:
    """The server's URL.

    Raises:
        NoServerError: there is none here.
    """
    programs, account = _server_programs(), _server_account()
    if programs is None or account is None:
        raise NoServerError("no initdb in /usr/lib/postgresql/*/bin or beside pg_ctl, or no account to run it as")

    folder = Path(tempfile.mkdtemp(prefix="knowstore-pg-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "password").write_text(PASSWORD)
    if os.geteuid() == 0:
        for path in (folder, folder / "password"):
            shutil.chown(path, account)

    def run(program: str, *arguments: str) -> None:
        identity: dict[str, Any] = {"user": account, "extra_groups": []} if os.geteuid() == 0 else {}
        with (folder / "log").open("ab") as log:  # a pipe would be kept open by the server
            done = subprocess.run(
                [programs / program, "-D", folder / "data", *arguments],
                cwd=folder, env={**os.environ, "LC_ALL": "C"}, stdout=log, stderr=log, timeout=60, **identity,
            )  # fmt: skip
        if done.returncode != 0:
            raise NoServerError(f"{program} failed: {(folder / 'log').read_text().strip()[-300:]}")

    try:
        run(
            "initdb", "-U", "knowstore", "-A", "scram-sha-256", "--pwfile", str(folder / "password"), "-N", "-E", "UTF8"
        )
        run("pg_ctl", "start", "-w", "-o", f"-F -p {port} -k {folder} -c listen_addresses=127.0.0.1")
        try:
            yield f"postgresql://knowstore:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "stop", "-w", "-m", "immediate")
    finally:
        shutil.rmtree(folder)
