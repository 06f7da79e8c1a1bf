"""What the benchmarks share: ranks with one thread each, interleaved medians, the machine's description, tables."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

EAGER_FREE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes the C library give freed memory back at once, so that resident memory tells what is in use."""


def run_ranks(
    ranks: int, work: Callable[..., Any], *args: Any, env: Mapping[str, str] | None = None, device: str = "cpu"
) -> list[Any]:
    """`work(rank, *args)` in `ranks` fresh processes with one thread each; their results in rank order.

    `env` is set in them from their start. On an accelerator, each has one of its own and they have its default backend.
    """
    before = dict(os.environ)
    os.environ.update(env or {})
    try:
        return _run_ranks(ranks, work, device, *args)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run_ranks(ranks: int, work: Callable[..., Any], device: str, *args: Any) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Through files: a queue blocks a rank whose result is larger than its pipe, and with it all ranks.
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (ranks, port, folder, work, device, args), nprocs=ranks)
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(ranks)]


def _enter(
    rank: int, ranks: int, port: int, folder: str, work: Callable[..., Any], device: str, args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if device != "cpu":
        torch.accelerator.set_device_index(rank)
    dist.init_process_group(dist.get_default_backend_for_device(device))
    with torch.inference_mode():
        Path(folder, str(rank)).write_bytes(pickle.dumps(work(rank, *args)))
    dist.destroy_process_group()


_ROWS, _STARTED = "BENCHMARK_ROWS", "BENCHMARK_STARTED"


def limited(
    command: Sequence[str], ranks: int | None, seconds: float, env: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], str | None]:
    """Run a Python program on `ranks` processes with torchrun's variables, for `seconds` at the most.

    None: one process without these variables. Returns the rows that its ranks have told by then, and why there are no
    more of them: None where it ended well. All its processes have ended, and what they have started in their process
    groups.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows")
        rows.touch()
        shared = {**os.environ, **(env or {}), _ROWS: str(rows), _STARTED: str(time.time())}
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | dict.fromkeys(
            ("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks)
        )
        places = [{}] if ranks is None else [{**world, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(ranks)]
        processes = [
            subprocess.Popen([sys.executable, *command], start_new_session=True, env=shared | place)
            for place in places
        ]  # fmt: skip
        reason = _until(processes, time.monotonic() + seconds)
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        told = [json.loads(line) for line in rows.read_text().splitlines()]
    failures = [row["failed"] for row in told if "failed" in row]
    if reason == _OVERTIME:
        reason = f"no result after {seconds:.0f} s"
    return [row for row in told if "failed" not in row], failures[0] if failures else reason


_OVERTIME = "overtime"


def _until(processes: Sequence[subprocess.Popen[bytes]], end: float) -> str | None:
    """Wait for the processes; why there is no use in waiting longer, or None."""
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            end = min(end, time.monotonic() + 2)  # The others may have a word to say.
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    failed = next((code for code in codes if code), None)
    return f"exit code {failed}" if failed else _OVERTIME if None in codes else None


def tell(row: Mapping[str, Any]) -> None:
    """Print a row of `limited`'s program at once, and keep it. Of all ranks, the first is heard."""
    if os.environ["RANK"] == "0":
        _keep(row)
        print(json.dumps(row), flush=True)


def _keep(row: Mapping[str, Any]) -> None:
    with Path(os.environ[_ROWS]).open("a") as file:
        file.write(json.dumps(row) + "\n")


def age() -> float:
    """Seconds since this rank of `limited` was started."""
    return time.time() - float(os.environ[_STARTED])


@contextmanager
def rank_of(device: str) -> Iterator[torch.device]:
    """Within it, this process is a rank of `limited` with its share of the cores; yields its device."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    if device != "cpu":
        torch.accelerator.set_device_index(rank)
    dist.init_process_group(dist.get_default_backend_for_device(device))
    try:
        yield torch.device("cpu") if device == "cpu" else torch.device(device, rank)
        dist.barrier()
    except Exception as error:
        _keep({"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"})
        raise
    dist.destroy_process_group()


class Spent(NamedTuple):
    """Medians: seconds of the clock, of the slowest rank, and of processor time, of this rank and all its threads."""

    seconds: float
    cpu: float
    turns: tuple[float, ...]
    """Seconds of the clock of each round."""

    def over(self, other: Spent) -> float:
        """Median of the ratios of the rounds: a machine whose speed changes changes both of a round."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.turns, other.turns, strict=True))


def interleaved(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Spent]:
    """Medians of each variant over `repeats` rounds in which all take turns, after one round of warm-up.

    A round ends for a variant when its slowest rank ends. Other work on the machine disturbs processor time less.
    """
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, call in variants.items():
            dist.barrier()
            started, used = time.perf_counter(), time.process_time()
            call()
            used = time.process_time() - used
            dist.barrier()
            if turn:
                turns[name].append((time.perf_counter() - started, used))
    spent = {name: tuple(zip(*both, strict=True)) for name, both in turns.items()}
    return {name: Spent(*map(statistics.median, both), both[0]) for name, both in spent.items()}


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine() -> dict[str, Any]:
    """Where and with what the numbers were made."""
    model = next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    return {
        "date": date.today().isoformat(),
        "processor": model,
        "cores": os.cpu_count(),
        "accelerator": str(torch.accelerator.current_accelerator() or "none"),
        "python": platform.python_version(),
        **versions,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table, aligned."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _text(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def report(title: str, rows: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """Print the machine and the table, and write both as JSON."""
    facts = machine()
    print(f"{title}\n" + ", ".join(f"{k} {v}" for k, v in facts.items()) + "\n")
    print(table(rows))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"title": title, "machine": facts, "rows": list(rows)}, indent=1) + "\n")
