"""The first calls of a fresh process: parallelize, one encode and one decode, beside diffusers on one device.

    python benchmarks/fresh.py --ranks 1 2                              # on CPU ranks, one thread each
    python benchmarks/fresh.py --ranks 1 2 4 --vaes "Wan 2.1 480" "FLUX.2 2048"     # on GPUs: VAEs of gpu_vaes.py

Each number is of processes of their own, in turns: diffusers; halovae with nothing on disk; halovae with what an
earlier process has left there (verdicts, and on GPUs compiled kernels). "first calls" is the seconds from before
parallelize until encode and decode have ended, of the first rank, the VAE being on the device; "process" is from the
start of the processes to the end of all, imports and random weights included. Medians; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SMALL = "Wan 2.1 base_dim 32 9x128x128"
"""Of the CPU's run: the real architecture, thinner, so that a run takes seconds."""
WAYS = ("diffusers", "empty", "filled")


def _vae_and_pictures(name: str) -> tuple[Any, dict[str, Any]]:
    import torch

    if name != SMALL:
        from gpu_vaes import HALVES, build, picture

        return build(name), {half: picture(name, half) for half in HALVES}
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=32, attn_scales=[]).eval().requires_grad_(False)
    return vae, {"encode": torch.randn(1, 3, 9, 128, 128), "decode": torch.randn(1, 16, 3, 16, 16)}


def child(name: str, way: str) -> None:
    """One rank of one way; the first prints its seconds."""
    import torch
    from torch import distributed as dist

    ranks, rank, on_gpu = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), name != SMALL
    torch.set_num_threads(1)
    if on_gpu:
        torch.accelerator.set_device_index(rank)
    if ranks > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    vae, pictures = _vae_and_pictures(name)
    wait = torch.accelerator.synchronize if on_gpu else lambda: None
    if way != "diffusers":
        import halovae.api.parallelize
    wait()
    if ranks > 1:
        dist.barrier()
    started = time.perf_counter()
    handle = None
    if way != "diffusers":
        handle = halovae.parallelize(vae)
    phases = dict[str, float]()
    phases["parallelize"] = time.perf_counter() - started
    with torch.no_grad():
        for half, tensor in pictures.items():
            call = getattr(vae, half)
            begun = time.perf_counter()
            call(tensor, return_dict=False)
            wait()
            phases[half] = time.perf_counter() - begun
            if handle is not None:
                phases[f"{half} probe"] = handle.last.phases.get("probe", 0.0)
    if rank == 0:
        print(json.dumps({"first calls": time.perf_counter() - started, **phases}), flush=True)
    if ranks > 1:
        dist.destroy_process_group()


def run(name: str, way: str, ranks: int, cache: str, port: int) -> dict[str, float]:
    """The seconds of one way in fresh processes."""
    shared = {
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": cache, "TRITON_CACHE_DIR": f"{cache}/triton", "HALOVAE_CACHE": "on",
    }  # fmt: skip
    command = [sys.executable, __file__, "--child", way, "--vaes", name]
    started = time.perf_counter()
    processes = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL)
        for rank in range(ranks)
    ]  # fmt: skip
    said, _ = processes[0].communicate()
    if any(process.wait() for process in processes):
        sys.exit(f"{name}, {way}, {ranks} ranks: a rank has failed")
    return {**json.loads(said.splitlines()[-1]), "process": time.perf_counter() - started}


def rows_of(name: str, counts: list[int], repeats: int) -> list[dict[str, Any]]:
    ways = [("diffusers", 1), *((way, ranks) for ranks in counts for way in WAYS[1:])]
    found: dict[tuple[str, int], list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as kept:
        port = 29600 + os.getpid() % 1000
        for ranks in counts:  # Fills what "filled" finds.
            run(name, "filled", ranks, f"{kept}/{ranks}", port)
        for _ in range(repeats):
            for way, ranks in ways:
                port += 1
                with tempfile.TemporaryDirectory() as empty:
                    cache = f"{kept}/{ranks}" if way == "filled" else empty
                    seconds = run(name, way, ranks, cache, port)
                found[way, ranks].append(seconds)
                print(f"{name}, {way}, ranks {ranks}: {seconds['first calls']:.2f} s", flush=True)
    medians = {
        way: {part: statistics.median(each[part] for each in runs) for part in runs[0]} for way, runs in found.items()
    }
    alone = medians["diffusers", 1]
    return [
        {
            "VAE": name, "way": way if way == "diffusers" else f"halovae, {way} cache", "ranks": ranks,
            "first calls s": row["first calls"], "to diffusers": row["first calls"] / alone["first calls"],
            "parallelize s": row["parallelize"], "encode s": row["encode"], "decode s": row["decode"],
            "probes s": row.get("encode probe", 0.0) + row.get("decode probe", 0.0),
            "process s": row["process"], "process to diffusers": row["process"] / alone["process"],
        }
        for (way, ranks), row in medians.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vaes", nargs="*", default=[SMALL], help="names, or parts of names")
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.vaes[0], options.child)
        return
    from harness import report

    names = [SMALL] if options.vaes == [SMALL] else _on_gpus(options.vaes)
    rows = [row for name in names for row in rows_of(name, options.ranks, options.repeats)]
    report(f"A fresh process, medians of {options.repeats}", rows, options.json)


def _on_gpus(parts: list[str]) -> list[str]:
    from gpu_vaes import VAES

    return [name for name in VAES if any(part in name for part in parts)]


if __name__ == "__main__":
    main()
