"""Frames as they come: `handle.decode_stream(latents)` against one call, and against latents that are cut by hand.

    python benchmarks/stream.py --ranks 1 2 --json benchmarks/results/stream-2core.json
    python benchmarks/stream.py --device cuda --frames 21 201

Wan 2.1 with random weights. `first` is when the first frames are there, `first/call` their share of the time of one
call; `stream/call` is the whole stream's. Memory is the growth during one call in fresh processes, on the first rank.
`by hand` is what one can do without a stream: decode some latent frames at a time with one more before them, whose
frames are thrown away; `its error` is how far that is from the call, relative in L2.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from harness import EAGER_FREE, report, run_ranks

import halovae
from halovae.base.memory import PeakMemory

SIZES = {"cpu": (32, 16, 16, "float32"), "cuda": (96, 60, 104, "bfloat16")}
"""Width of the network, rows and columns of the latents, dtype."""
AT_ONCE = 4
"""Latent frames in a part that is cut by hand."""


def build(device: str, frames: int) -> tuple[Any, torch.Tensor]:
    width, rows, cols, name = SIZES[device]
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    dtype = getattr(torch, name)
    vae = AutoencoderKLWan(base_dim=width).to(device, dtype).eval().requires_grad_(False)
    latents = torch.randn(1, 16, frames, rows, cols, generator=torch.Generator().manual_seed(1))
    return vae, latents.to(device, dtype)


def one_call(vae: Any, handle: halovae.Handle, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    yield vae.decode(latents).sample


def stream(vae: Any, handle: halovae.Handle, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from handle.decode_stream(latents)


def by_hand(vae: Any, handle: halovae.Handle, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    for at in range(0, latents.shape[2], AT_ONCE):
        before = min(at, 1)
        frames = vae.decode(latents[:, :, at - before : at + AT_ONCE]).sample
        yield frames[:, :, before:]


WAYS: dict[str, Callable[..., Iterator[torch.Tensor]]] = {"call": one_call, "stream": stream, "by hand": by_hand}


def timed(way: str, *given: Any) -> tuple[float, float]:
    """Seconds to the first frames, and to the last."""
    started, first = time.perf_counter(), 0.0
    for frames in WAYS[way](*given):
        if frames.is_cuda:
            torch.cuda.synchronize()
        first = first or time.perf_counter() - started
        del frames
    return first, time.perf_counter() - started


def measure_time(rank: int, device: str, frames: int, repeats: int) -> dict[str, Any]:
    vae, latents = build(device, frames)
    with halovae.parallelize(vae) as handle:
        given = vae, handle, latents
        whole = {way: torch.cat([part.cpu() for part in make(*given)], 2).double() for way, make in WAYS.items()}
        assert torch.equal(whole["stream"], whole["call"])
        error = (whole["by hand"] - whole["call"]).norm() / whole["call"].norm()
        count = whole["call"].shape[2]
        del whole
        turns = [{way: timed(way, *given) for way in WAYS} for _ in range(repeats)]
    whole_call = statistics.median(turn["call"][1] for turn in turns)
    return {
        "frames": count,
        "call s": whole_call,
        "first s": statistics.median(turn["stream"][0] for turn in turns),
        "first/call": statistics.median(turn["stream"][0] / turn["call"][1] for turn in turns),
        "stream/call": statistics.median(turn["stream"][1] / turn["call"][1] for turn in turns),
        "by hand/call": statistics.median(turn["by hand"][1] / turn["call"][1] for turn in turns),
        "its error": error.item(),
    }


def measure_memory(rank: int, device: str, frames: int, way: str) -> float:
    vae, latents = build(device, frames)
    with halovae.parallelize(vae, verify=False) as handle:
        timed(way, vae, handle, latents[:, :, :3])  # What libraries and weights take once.
        gc.collect()
        memory = PeakMemory(latents.device)
        timed(way, vae, handle, latents)
        return memory.growth / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=list(SIZES))
    parser.add_argument("--ranks", type=int, nargs="*", default=[1])
    parser.add_argument("--frames", type=int, nargs="*", default=[21], help="latent frames")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for ranks in options.ranks:
        for frames in options.frames:
            given = options.device, frames
            row = run_ranks(ranks, measure_time, *given, options.repeats, device=options.device)[0]
            mib = {
                way: run_ranks(ranks, measure_memory, *given, way, env=EAGER_FREE, device=options.device)[0]
                for way in ("call", "stream")
            }
            memory = {f"{way} MiB": round(growth) for way, growth in mib.items()}
            rows.append({"ranks": ranks, **row, **memory, "memory": mib["stream"] / mib["call"]})
    report("Wan 2.1 decode as a stream", rows, options.json)


if __name__ == "__main__":
    main()
