"""A folder of clips to latents: `halovae encode-dataset` against tensors in memory, and against a plain loop.

    python benchmarks/dataset.py --json benchmarks/results/dataset-2core.json
    python benchmarks/dataset.py --devices 1,2,4          on GPUs: Wan 2.1 of its size, 480x832x81, bfloat16
    python benchmarks/dataset.py --devices 1,2,4 --in-process

`memory` is the VAE after `halovae.optimize` on clips that are decoded already, as many in one go as the command takes.
`loop` is PyAV, Pillow, diffusers' own encode and `torch.save`. `dataset` is the command with a local Ray on
`--devices`. `--in-process` puts the command's own steps together without Ray, for machines that don't have it: the
same reading, device and writing, in processes that share memory; what Ray itself costs is not in it.

Rates are steady ones: each way has encoded a few units of the size before its clock starts, and of the command the
last two thirds of the clips count. What comes before them is told as `start, s`: Ray, imports, the model, and the first
calls. The ways take turns, round by round; rates are medians, and ratios are medians of the rounds' ratios.
`processor, s` is what a clip costs all processes together: on a machine with other work on it, it tells more.

`scaling` is the rate of a device among so many, over that of a device of the first count of `--devices`.

The table and the JSON are made anew after each way. A way that takes longer than `--limit` counts with what it has
encoded by then.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import diffusers
import numpy as np
import torch
from harness import report
from PIL import Image

import halovae
from halovae import media
from halovae.app.session import device_kind
from halovae.datasets import workers
from halovae.datasets.buckets import Bucket, parse_buckets, take
from halovae.datasets.formats import LATENTS, Storage
from halovae.datasets.items import find_items
from halovae.datasets.units import Job, together, units_of
from halovae.media import codec, models, vae_limits
from halovae.media.latents_file import scaling_of

SOURCE = Path(__file__).parents[1] / "media" / "bigbuckbunny.mp4"
RANDOM = "wan"
"""As `--model`: Wan 2.1 of random weights."""
WARM = 4
"""Units of each device until its calls are steady: the first ones try kernels."""
UNITS = 6
"""That are measured, on each device."""
DISTINCT = 8
"""Clips; the others are copies."""


class Spent(NamedTuple):
    rate: float
    """Clips per minute."""
    start: float = 0.0
    """Seconds until it is steady."""
    processor: float = float("nan")
    """Seconds of processors for each clip."""


def make_clips(folder: Path, bucket: Bucket, count: int) -> None:
    """Clips a little larger than the bucket."""
    height, width = bucket.height * 5 // 4, bucket.width * 5 // 4
    frames = media.read(SOURCE, height=height + height % 2, width=width + width % 2).frames
    for number in range(count):
        path = folder / f"{number:04}.mp4"
        if number < DISTINCT:
            media.write(path, frames[np.arange(7 * number, 7 * number + bucket.frames) % len(frames)], Fraction(25))
        else:
            shutil.copyfile(folder / f"{number % DISTINCT:04}.mp4", path)


def load(given: argparse.Namespace) -> tuple[Any, vae_limits.Limits]:
    vae = models.load(models.find(given.model), dtype=getattr(torch, given.dtype), device=torch.device(given.device))
    return vae, vae_limits.limits_of(vae)


def clocked(calls: Sequence[Callable[[], Any]], clips: int, limit: float) -> Spent:
    """Of calls of so many clips each, the first `WARM` of which count as the start."""
    started = time.perf_counter()
    for call in calls[:WARM]:
        call()
    began, used, count = time.perf_counter(), time.process_time(), 0
    for call in calls[WARM:]:
        call()
        count += clips
        if time.perf_counter() - started > limit:
            break
    seconds = time.perf_counter() - began
    return Spent(60 * count / seconds, began - started, (time.process_time() - used) / count)


def in_memory(given: argparse.Namespace, folder: Path, bucket: Bucket) -> Spent:
    vae, limits = load(given)
    items = find_items(str(folder / "*.mp4"))[: together(bucket)]
    dtype, device = getattr(torch, given.dtype), torch.device(given.device)
    unit = [codec.to_tensor(take(item, bucket, None).pixels, dtype, device) for item in items]

    def encode() -> None:
        for latents in codec.encode_clips(vae, limits, unit):
            latents.cpu()

    with halovae.optimize(vae), torch.inference_mode():
        # On a GPU such a call takes less than a second.
        return clocked([encode] * (WARM + UNITS * (1 if given.device == "cpu" else 5)), len(unit), given.limit)


def plain_loop(given: argparse.Namespace, folder: Path, bucket: Bucket) -> Spent:
    vae, _ = load(given)

    def work(path: Path) -> None:
        with av.open(str(path)) as container:
            images = [frame.to_image() for _, frame in zip(range(bucket.frames), container.decode(video=0))]  # noqa: B905
        resized = [image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS) for image in images]
        clip = torch.from_numpy(np.stack([np.asarray(image) for image in resized]))
        clip = clip.to(given.device).to(getattr(torch, given.dtype)) / 127.5 - 1
        torch.save(vae.encode(clip.permute(3, 0, 1, 2)[None]).latent_dist.mode().cpu(), folder / f"{path.stem}.pt")

    paths = sorted(folder.glob("*.mp4"))[: WARM + 2 * UNITS]
    with torch.inference_mode():
        return clocked([lambda path=path: work(path) for path in paths], 1, given.limit)


def steady(output: Path, started: float, warm: int, used: Sequence[tuple[float, float]]) -> Spent:
    """From the times at which files were finished.

    Args:
        output: their folder.
        started: when the work was.
        warm: how many belong to the start at least.
        used: times, and the seconds of processors until then.
    """
    ends = sorted(path.stat().st_mtime for path in output.rglob("*.safetensors"))
    # The first results wait for the processes that write them, and then come all at once.
    first = max(warm, len(ends) // 3)
    if len(ends) <= first:
        return Spent(float("nan"))
    began, ended, count = ends[first - 1], ends[-1], len(ends) - first
    processor = float("nan")
    if used:
        at = np.interp([began, ended], [when for when, _ in used], [seconds for _, seconds in used])
        processor = float(at[1] - at[0]) / count
    return Spent(60 * count / (ended - began), began - started, processor)


class Processors(threading.Thread):
    """Watches what this process and all that it has started have used."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.used: list[tuple[float, float]] = []
        self.over = threading.Event()

    def run(self) -> None:
        import psutil

        most: dict[int, float] = {}
        while not self.over.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    times = process.cpu_times()
                except psutil.Error:
                    continue
                most[process.pid] = times.user + times.system
            self.used.append((time.time(), sum(most.values())))


def dataset(given: argparse.Namespace, folder: Path, bucket: Bucket, devices: int) -> Spent:
    output = folder / f"latents-{devices}"
    shutil.rmtree(output, ignore_errors=True)
    words = ["encode-dataset", str(folder / "*.mp4"), "-o", str(output), "--bucket", str(bucket)]
    words += ["--dtype", given.dtype, "--device", given.device, "--devices", str(devices)]
    words += ["--model", given.model] if given.model else []
    started, watch = time.time(), Processors()
    watch.start()
    command = subprocess.Popen([sys.executable, "-m", "halovae", *words])
    try:
        code = command.wait(given.limit)
    except subprocess.TimeoutExpired:
        code = "out of time"
        command.send_signal(signal.SIGINT)  # It ends its Ray.
        try:
            command.wait(30)
        except subprocess.TimeoutExpired:
            command.kill()
            command.wait()
    if code:
        print(f"the command on {devices}: {code}", flush=True)
    watch.over.set()
    watch.join()
    return steady(output, started, WARM * devices * together(bucket), watch.used)


def in_process(given: argparse.Namespace, folder: Path, bucket: Bucket, devices: int) -> Spent:
    """The steps of the command without Ray: readers and writers in a pool, a process for each device."""
    output = folder / f"in-process-{devices}"
    shutil.rmtree(output, ignore_errors=True)
    source = models.find(given.model)
    _, skeleton = models.find_skeleton(given.model)
    layout = Storage(
        folder=str(output), format="safetensors", store="mode", dtype=given.dtype, model=source.model,
        model_class=source.class_name, scaling=scaling_of(skeleton.config),
    )  # fmt: skip
    job = Job(
        layout=layout, device=given.device, dtype=given.dtype, fps=None,
        threads=max(1, cores() // devices) if given.device == "cpu" else 1,
    )  # fmt: skip
    units = units_of([(item, bucket) for item in find_items(str(folder / "*.mp4"))], set())
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    window = threading.Semaphore(2 * devices + readers(devices, given.device))
    started = time.time()
    those = [context.Process(target=_at_device, args=(n, job, inbox, outbox), daemon=True) for n in range(devices)]
    for process in those:
        process.start()
    with ProcessPoolExecutor(readers(devices, given.device), context) as pool:
        written: list[Future[Any]] = []

        def collect() -> None:
            for _ in units:
                written.append(pool.submit(workers.write_unit, outbox.get(), job))
                window.release()

        collector = threading.Thread(target=collect, daemon=True)
        collector.start()
        for unit in units:
            window.acquire()
            reading = pool.submit(_read, pickle.dumps(unit), job)
            reading.add_done_callback(lambda done: inbox.put(done.result()))
        collector.join()
        told = [json.loads(future.result()["told"]) for future in written]
    for _ in range(2 * devices):
        inbox.put(None)
    for process in those:
        process.join()
    faults = [result for row in told for result in row["results"] if result["what"] != workers.DONE]
    assert not faults, faults[0]
    return steady(output / LATENTS, started, WARM * devices * together(bucket), ())


def cores() -> int:
    return len(os.sched_getaffinity(0))


def readers(devices: int, device: str) -> int:
    """As many as the command has."""
    return max(1, cores() // 2 if device == "cpu" else cores() - devices)


def _read(unit: bytes, job: Job) -> dict[str, Any]:
    row = workers.read_unit({"unit": unit}, job)
    with tempfile.NamedTemporaryFile(dir="/dev/shm", suffix=".npy", delete=False) as file:
        np.save(file, row.pop("pixels"))
    return {**row, "file": file.name}


def _at_device(number: int, job: Job, inbox: Any, outbox: Any) -> None:
    """Two threads, as Ray has: one brings clips to the device while those of the other are encoded."""
    if job.device == "cuda":
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[number] if seen else str(number)
    device = workers.Device(job)

    def work() -> None:
        while (row := inbox.get()) is not None:
            name = row.pop("file")
            made = device.encode(np.load(name, mmap_mode="r"))
            os.unlink(name)
            latents = made.pop("latents", None)
            outbox.put({**row, "made": json.dumps(made), "latents": latents})

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=RANDOM, help="as of the command; default: Wan 2.1 of random weights")
    parser.add_argument("--base-dim", type=int, help=f"of {RANDOM}; default: 32 on a CPU, else 96 as in the real one")
    parser.add_argument("--bucket", help="default: 128x192x9 on a CPU, else 480x832x81")
    parser.add_argument("--clips", type=int, help="default: as few as tell a steady rate")
    parser.add_argument("--device", default=device_kind(None))
    parser.add_argument("--devices", default="1", help="such as 1,2,4")
    parser.add_argument("--dtype", help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=["memory", "loop", "dataset", "in process"], help="default: all")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for a way in a round")
    parser.add_argument("--in-process", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    on_cpu = given.device == "cpu"
    given.base_dim = given.base_dim or (32 if on_cpu else 96)
    given.dtype = given.dtype or ("float32" if on_cpu else "bfloat16")
    (bucket,) = parse_buckets([given.bucket or ("128x192x9" if on_cpu else "480x832x81")])
    counts = list(map(int, given.devices.split(",")))
    # What is read ahead of the devices while they start must not be most of what is counted.
    least = max((WARM + UNITS) * n * together(bucket) + 3 * readers(n, given.device) for n in counts)
    clips = given.clips or least
    if clips < least:
        parser.error(f"--clips {clips}: {least} at least, else the rate is that of a burst")
    model = f"Wan 2.1 of base_dim {given.base_dim}" if given.model == RANDOM else given.model
    title = f"{clips} clips of {bucket}, {model}, {given.dtype}, {given.rounds} rounds"
    ours = in_process if given.in_process else dataset
    name = "in process" if given.in_process else "dataset"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if given.model == RANDOM:
            torch.manual_seed(0)
            vae = diffusers.AutoencoderKLWan(base_dim=given.base_dim)
            vae.to(getattr(torch, given.dtype)).save_pretrained(folder / "model")
            given.model = str(folder / "model")
        make_clips(folder, bucket, clips)
        ways: dict[str, Callable[[], Spent]] = {
            "memory": lambda: in_memory(given, folder, bucket), "loop": lambda: plain_loop(given, folder, bucket)
        }  # fmt: skip
        devices = {f"{name}, {n} {given.device}": n for n in counts}
        ways |= {way: lambda n=n: ours(given, folder, bucket, n) for way, n in devices.items()}
        found: dict[str, list[Spent]] = {way: [] for way in ways if way.split(",")[0] in given.ways}
        for _ in range(given.rounds):
            for way, those in found.items():
                those.append(ways[way]())
                report(title, [_row(way, found, devices) for way in found if found[way]], given.json)
                sys.stdout.flush()


def _row(way: str, found: Mapping[str, list[Spent]], devices: Mapping[str, int]) -> dict[str, Any]:
    def over(other: str) -> float:
        pairs = list(zip(found[way], found.get(other, ()), strict=False))  # The last round may not be over.
        return statistics.median(mine.rate / its.rate for mine, its in pairs) if pairs else float("nan")

    rate, start, processor = map(statistics.median, zip(*found[way], strict=True))
    row = {"way": way, "clips/min": rate, "of memory": over("memory"), "of loop": over("loop")}
    first = next(iter(devices))
    row["scaling"] = over(first) * devices[first] / devices[way] if way in devices else float("nan")
    return {**row, "start, s": start, "processor, s": processor}


if __name__ == "__main__":
    main()
