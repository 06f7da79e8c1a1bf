"""What the benchmarks of the server share: a server on this machine's loopback, and the video they ask for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

PATIENCE = 300


@contextmanager
def served(model: Path, store: Path, *options: str) -> Iterator[tuple[httpx2.Client, int]]:
    """A server that is ready: a client for it, and its process id. Ends with the block."""
    words = ["serve", "--model", str(model), "--served-model-name", "demo", "--port", "0", "--store", str(store)]
    process = subprocess.Popen(
        [sys.executable, "-m", "halovae", *words, *options], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert process.stderr is not None
        found = re.search(r"on (http://\S+)", process.stderr.readline())
        if found is None:
            raise SystemExit(process.stderr.read())
        limits = httpx2.Limits(max_connections=None)
        with httpx2.Client(base_url=found[1], timeout=PATIENCE, limits=limits) as client:
            wait(client)
            yield client, process.pid
    finally:
        process.terminate()
        process.wait(30)


def wait(client: httpx2.Client) -> None:
    """Until every rank answers."""
    deadline = time.monotonic() + PATIENCE
    while client.get("/health").status_code != 200:
        if time.monotonic() > deadline:
            raise SystemExit(f"the server does not get ready: {client.get('/health').text}")
        time.sleep(0.2)


def finished(client: httpx2.Client, job: str) -> dict[str, Any]:
    """A job when it is over, by its events."""
    last: dict[str, Any] = {}
    with client.stream("GET", f"/v1/videos/{job}/events") as answer:
        for line in answer.iter_lines():
            last = json.loads(line[6:]) if line.startswith("data: ") else last
    return last


def halovae(*arguments: str) -> None:
    """The command line, which has to succeed."""
    subprocess.run([sys.executable, "-m", "halovae", *arguments], check=True)
