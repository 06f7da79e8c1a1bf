"""The first six calls of a kind on all GPUs of a host, and on one of them, without any option.

    torchrun --nproc-per-node 2 benchmarks/gpu_first_calls.py --vaes "Wan 2.1 480" "FLUX.2 2048" --json FILE

The VAEs, sizes and random weights of `gpu_vaes.py`. Seconds of the host's clock, of the slowest rank, with the device
at rest before and after. The first call has the probe and, where kernels are not in their cache on disk, their
compilation; a later one is recorded where that pays, and those after it are replayed. "efficiency" is of our own one
GPU, by the least of the last three calls.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_vaes import HALVES, VAES, build, call, picture
from harness import report
from torch import distributed as dist

import halovae

CALLS = 6


def seconds(run: Callable[[], Any]) -> list[float]:
    """Of each call, until all ranks have made it."""
    found: list[float] = []
    for _ in range(CALLS):
        dist.barrier()
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        dist.barrier()
        found.append(time.perf_counter() - started)
    return found


def rows_of(name: str) -> list[dict[str, Any]]:
    """One row for each half, on the first rank; on others they mean nothing."""
    many, rows = build(name), list[dict[str, Any]]()
    one = build(name) if dist.get_rank() == 0 else None
    handle = halovae.parallelize(many)
    if one is not None:
        halovae.optimize(one)
    for half in HALVES:
        tensor = picture(name, half)
        on_all = seconds(lambda tensor=tensor, half=half: call(many, half, tensor))
        alone = seconds(lambda tensor=tensor, half=half: call(one, half, tensor) if one is not None else None)
        assert handle.last is not None
        best, best_alone = min(on_all[3:]), min(alone[3:])
        rows.append({
            "VAE": name, "half": half, "GPUs": dist.get_world_size(),
            "calls s": " ".join(f"{each:.3f}" for each in on_all), "one GPU s": " ".join(f"{e:.3f}" for e in alone),
            "speed-up": best_alone / best, "efficiency": best_alone / best / dist.get_world_size(),
            "replayed": handle.last.replayed, "grid": "x".join(map(str, handle.last.shape)),
            "messages": handle.last.messages, "exchanges s": handle.last.wait_seconds,
        })  # fmt: skip
    handle.restore()
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vaes", nargs="*", default=["Wan 2.1", "FLUX.2 2048"], help="names, or parts of names")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    rows: list[dict[str, Any]] = []
    for name in (name for name in VAES if any(part in name for part in options.vaes)):
        rows += rows_of(name)
        if dist.get_rank() == 0:
            print(rows[-2:], flush=True)
    if dist.get_rank() == 0:
        report(f"{dist.get_world_size()} of {torch.cuda.get_device_name()}", rows, options.json)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
