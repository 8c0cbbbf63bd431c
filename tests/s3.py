"""A real S3 server of our own on loopback: moto's, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

BUCKET = "knowledge"
_START_S = 120


class NoS3Error(Exception):
    """There is no S3 server to test with; says what is missing."""


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Yields the environment by which clients reach a server that has one bucket, `knowledge`: a new one, or what
    AWS_ENDPOINT_URL names on loopback.

    Raises:
        NoS3Error: moto's server is not installed.
    """
    missing = [name for name in ("moto", "flask", "flask_cors", "boto3") if importlib.util.find_spec(name) is None]
    if missing:
        raise NoS3Error(f"{', '.join(missing)} not installed (pip install 'moto[s3]' flask flask-cors)")
    running = os.environ.get("AWS_ENDPOINT_URL", "")
    if running.startswith("http://127.0.0.1:"):
        _make_bucket(f"{running}/{BUCKET}")
        yield _environment(running)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _make_bucket(f"http://127.0.0.1:{port}/{BUCKET}")
        yield _environment(f"http://127.0.0.1:{port}")
    finally:
        server.kill()
        server.wait()


def _environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }


def _make_bucket(url: str) -> None:
    until = time.monotonic() + _START_S
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="PUT")):
                return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def objects() -> dict[str, bytes]:
    """Every object of the bucket by key, with its bytes."""
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name=os.environ["AWS_REGION"])
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    keys = [one["Key"] for page in pages for one in page.get("Contents", [])]
    return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}
