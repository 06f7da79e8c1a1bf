"""A server in processes of its own, and clients of it."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
from command import PATIENCE, end_with_parent, start

SMALL = {"prompt": "a cup", "size": "64x64", "num_frames": "5", "num_inference_steps": "2", "seed": "3"}
"""The fields of a video that takes a second."""


def _few_files() -> None:
    end_with_parent()
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Within it, `folder` is a disk of its own, of 64 MiB, where disks can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


class Server:
    """`halovae serve` on a free port, with 256 descriptors, as some systems give them.

    Args:
        model: folder of the pipeline.
        store: of the jobs.
        options: of the command line.
    """

    def __init__(self, model: Path, store: Path, *options: str) -> None:
        self.store, self.temporary, self._log = store, store.parent / "temporary", store.parent / "log"
        self.temporary.mkdir(exist_ok=True)
        self._words = ("--model", str(model), "--store", str(store), "--served-model-name", "demo", *options)
        self.start()

    def start(self) -> None:
        """Start it, for the first time or after it was killed."""
        with self._log.open("w") as log:
            self.process = start(
                "serve", "--port", "0", *self._words, stdout=subprocess.DEVNULL, stderr=log, preexec_fn=_few_files,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)},
            )  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while (found := re.search(r"on (http://\S+)\n", self.said())) is None:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)
        self.address = found[1]
        self.client = httpx2.Client(base_url=self.address, timeout=PATIENCE)

    def said(self) -> str:
        """What it has written to standard error."""
        return self._log.read_text()

    def health(self) -> dict[str, Any]:
        return self.client.get("/health").json()

    def until_ready(self, starts: int = 1) -> Server:
        """Until the group, or one that was started later, answers."""
        self.until(lambda: (found := self.health())["ready"] and found["starts"] >= starts)
        return self

    def until(self, condition: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.health()
            time.sleep(0.05)

    def create(self, image: Path, **fields: str) -> dict[str, Any]:
        answer = self.post("/v1/videos", image, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, image: Path, **fields: str) -> httpx2.Response:
        files = {"input_reference": (image.name, image.read_bytes())}
        return self.client.post(path, data={**SMALL, **fields}, files=files)

    def video(self, job: str) -> dict[str, Any]:
        return self.client.get(f"/v1/videos/{job}").json()

    def finished(self, job: str) -> dict[str, Any]:
        """The job when it is over, by its events."""
        last: dict[str, Any] = {}
        with self.client.stream("GET", f"/v1/videos/{job}/events") as answer:
            for line in answer.iter_lines():
                last = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else last
        return last

    def ranks(self) -> list[psutil.Process]:
        """The processes that hold the pipeline."""
        return psutil.Process(self.process.pid).children()

    def kill(self) -> None:
        """As the system does when memory runs out. May be called once more."""
        self.client.close()
        self.process.kill()
        self.process.wait()

    def stop(self) -> tuple[int, str]:
        """As Ctrl-C does; the exit code and what was said."""
        self.client.close()
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=30)
        finally:
            self.kill()
        return self.process.returncode, self.said()
