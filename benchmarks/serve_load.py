"""Many clients at once: no job lost, no wrong video, memory flat, and what the server adds to generation.

    python benchmarks/serve_load.py --clients 64 --jobs 2 --seconds 600

Each client asks for videos one after another, with one of a few seeds, and compares each file with the one that the
server made with that seed before there were other clients. "Added" is the time from sending a request to having the
file, less the time that the job waited for its turn and less the stages of generation. Loopback only; no client asks
for another video after --seconds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
import psutil
from PIL import Image
from serving import finished, halovae, served

SEEDS = 4
FIELDS = {"prompt": "a cup", "size": "64x64", "num_frames": "5", "num_inference_steps": "2"}


@dataclass
class Count:
    """What the clients found."""

    done: int = 0
    wrong: int = 0
    failed: int = 0
    turned_away: int = 0
    added: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)


def main() -> int:
    options = _options()
    count, lock = Count(), threading.Lock()
    with tempfile.TemporaryDirectory() as folder:
        halovae("make-demo-model", f"{folder}/model")
        with served(Path(folder) / "model", Path(folder) / "store", "--ranks", str(options.ranks)) as (client, pid):
            expected = [
                _content(client, finished(client, _post(client, seed).json()["id"])["id"]) for seed in range(SEEDS)
            ]
            deadline = time.monotonic() + options.seconds
            memory = [_memory(pid)]

            def work(number: int) -> None:
                for turn in range(options.jobs):
                    if time.monotonic() > deadline:
                        return
                    _one(client, (number + turn) % SEEDS, expected, count, lock, deadline)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(options.clients)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(2)
                memory.append(_memory(pid))
            for thread in threads:
                thread.join()
            kept = client.get("/v1/videos?limit=1").json()["data"]
    return _say(options, count, memory, bool(kept))


def _one(
    client: httpx2.Client, seed: int, expected: list[bytes], count: Count, lock: threading.Lock, deadline: float
) -> None:
    while True:
        sent = time.monotonic()
        answer = _post(client, seed)
        if answer.status_code != 429:
            break
        with lock:
            count.turned_away += 1
        if time.monotonic() > deadline:
            return  # Never taken, so not done.
        time.sleep(float(answer.headers["retry-after"]))
    accepted = time.monotonic() - sent
    job = finished(client, answer.json()["id"])
    content = _content(client, job["id"]) if job["status"] == "completed" else b""
    elapsed = time.monotonic() - sent
    with lock:
        count.answered.append(accepted)
        count.done += job["status"] == "completed"
        count.failed += job["status"] != "completed"
        count.wrong += bool(content) and content != expected[seed]
        if job["status"] == "completed":
            count.added.append(elapsed - job["seconds_waited"] - sum(job["timings"].values()))


def _say(options: argparse.Namespace, count: Count, memory: list[float], kept: bool) -> int:
    asked = options.clients * options.jobs
    half = len(memory) // 2
    document = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "date": time.strftime("%Y-%m-%d"),
        "clients": options.clients, "asked": asked, "done": count.done, "failed": count.failed, "wrong": count.wrong,
        "turned_away": count.turned_away,
        "accepted_p50": _share(count.answered, 0.5), "accepted_p95": _share(count.answered, 0.95),
        "added_p50": _share(count.added, 0.5), "added_p95": _share(count.added, 0.95),
        "memory_first_half_mib": max(memory[: half or 1]), "memory_second_half_mib": max(memory[half:]),
    }  # fmt: skip
    print(json.dumps(document, indent=2))
    return 0 if count.done == asked and not count.wrong and kept else 1


def _share(values: list[float], share: float) -> float | None:
    return statistics.quantiles(values, n=100)[round(100 * share) - 1] if len(values) > 1 else None


def _post(client: httpx2.Client, seed: int) -> httpx2.Response:
    return client.post("/v1/videos", data={**FIELDS, "seed": str(seed)}, files={"input_reference": _picture(seed)})


def _content(client: httpx2.Client, job: str) -> bytes:
    return client.get(f"/v1/videos/{job}/content").raise_for_status().content


def _picture(seed: int) -> bytes:
    """Another one for each seed: else every video of the demonstration model would be the same."""
    noise = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def _memory(pid: int) -> float:
    """Of the server and its ranks, in MiB."""
    server = psutil.Process(pid)
    return sum(process.memory_info().rss for process in (server, *server.children(recursive=True))) / 2**20


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=2, help="of each client")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--ranks", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
