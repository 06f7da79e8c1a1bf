"""A server in processes of its own, and clients of it."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import time
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


class Server:
    """`halovae serve` on a free port, with 256 descriptors, as some systems give them.

    Args:
        model: folder of the pipeline.
        store: of the jobs.
        options: of the command line.
    """

    def __init__(self, model: Path, store: Path, *options: str) -> None:
        self.store, self.temporary = store, store.parent / "temporary"
        self.temporary.mkdir(exist_ok=True)
        self.process = start(
            "serve", "--model", str(model), "--port", "0", "--store", str(store), "--served-model-name", "demo",
            *options,
            stdout=subprocess.DEVNULL, preexec_fn=_few_files,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)},
        )  # fmt: skip
        self.address = self._address()
        self.client = httpx2.Client(base_url=self.address, timeout=PATIENCE)

    def _address(self) -> str:
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        found = re.search(r"on (http://\S+)", line)
        if found is None:
            self.process.kill()
            raise AssertionError(line + self.process.stderr.read())
        return found[1]

    def health(self) -> dict[str, Any]:
        return self.client.get("/health").json()

    def until_ready(self, starts: int = 1) -> Server:
        """Until the group, or one that was started later, answers."""
        self.until(lambda: (found := self.health())["ready"] and found["starts"] >= starts)
        return self

    def until(self, condition: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1]
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
        assert self.process.stderr is not None
        self.process.stderr.close()

    def stop(self) -> tuple[int, str]:
        """As Ctrl-C does; the exit code and what was said."""
        self.client.close()
        self.process.send_signal(signal.SIGINT)
        try:
            _, said = self.process.communicate(timeout=30)
        finally:
            self.kill()
        return self.process.returncode, said
