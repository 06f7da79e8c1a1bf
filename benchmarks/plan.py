"""What `halovae plan` predicts against what is measured, in one run on this machine.

    python benchmarks/plan.py --halves encode decode

One thread per rank. The device is measured by itself, then the link between the ranks, then each mode runs on each
number of ranks. Times are medians of rounds, of the slowest rank; memory is the growth of the resident memory of a
fresh process during one call, on the rank where it grew most. Goals: 25 % for time, 15 % for memory.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from harness import EAGER_FREE, interleaved, report, run_ranks

import halovae
from halovae import comm
from halovae.link_speed import LINKS, LinkSpeed, measure
from halovae.memory import PeakMemory
from halovae.predict import Prediction, Predictor
from halovae.speed import MeasuredSpeed
from halovae.target import Target

CPU = torch.device("cpu")
Way = tuple[str, int]
"""Mode and number of ranks."""


def build(options: argparse.Namespace) -> Any:
    """A VAE of Wan 2.1's architecture with random weights, the same on every rank."""
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # diffusers warns of .to(dtype) for an empty list of modules
    vae = AutoencoderKLWan(base_dim=options.base_dim).to(getattr(torch, options.dtype)).eval().requires_grad_(False)
    vae.enable_tiling(options.tile, options.tile, options.tile * 3 // 4, options.tile * 3 // 4)
    return vae


def picture(options: argparse.Namespace, half: str) -> torch.Tensor:
    height, width, frames = options.size
    shape = (3, frames, height, width) if half == "encode" else (16, (frames - 1) // 4 + 1, height // 8, width // 8)
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(1)).to(getattr(torch, options.dtype))


def measured_link(rank: int) -> LinkSpeed:
    return measure(comm.connect(), CPU)


def predict(
    rank: int, options: argparse.Namespace, half: str, ways: list[Way], link: LinkSpeed
) -> dict[Way, tuple[float, int]]:
    """Seconds and bytes of growth of each way."""
    tensor = picture(options, half)
    predictor = Predictor(Target(build(options)), MeasuredSpeed(CPU, tensor.dtype), link)

    def one(mode: str, ranks: int) -> Prediction:
        if mode == "tile":
            return predictor.tile(half, (tensor,), {}, ranks=ranks)
        return predictor.exact(half, (tensor,), {}, ranks=ranks, ratio=8 if half == "encode" else 1)

    found = {(mode, ranks): one(mode, ranks) for mode, ranks in ways}
    return {way: (prediction.seconds, prediction.memory - tensor.nbytes) for way, prediction in found.items()}


def run(vae: Any, half: str, tensor: torch.Tensor) -> Any:
    return getattr(vae, half)(tensor)


def time_of(rank: int, options: argparse.Namespace, half: str, mode: str) -> float:
    vae, tensor = build(options), picture(options, half)
    halovae.parallelize(vae, mode=mode, verify=False)
    return interleaved({mode: lambda: run(vae, half, tensor)}, options.repeats)[mode].seconds


def growth_of(rank: int, options: argparse.Namespace, half: str, mode: str) -> int:
    vae, tensor = build(options), picture(options, half)
    halovae.parallelize(vae, mode=mode, verify=False)
    run(vae, half, tensor[..., : tensor.shape[-2] // 4, : tensor.shape[-1] // 4].contiguous())  # libraries load
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    memory = PeakMemory(CPU)
    run(vae, half, tensor)
    return (memory.read() or 0) - before


def rows(options: argparse.Namespace, half: str, link: LinkSpeed) -> list[dict[str, Any]]:
    ways = [(mode, ranks) for mode in ("exact", "tile") for ranks in options.ranks]
    predicted = run_ranks(1, predict, options, half, ways, link)[0]
    found: list[dict[str, Any]] = []
    for mode, ranks in ways:
        seconds, growth = predicted[mode, ranks]
        actual = max(run_ranks(ranks, time_of, options, half, mode))
        grown = max(run_ranks(ranks, growth_of, options, half, mode, env=EAGER_FREE))
        row = {"half": half, "mode": mode, "ranks": ranks, "predicted s": seconds, "measured s": actual}
        row |= {"time error %": 100 * (seconds / actual - 1), "predicted MiB": growth / 2**20}
        row |= {"measured MiB": grown / 2**20, "memory error %": 100 * (growth / grown - 1)}
        print(row, file=sys.stderr, flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--halves", nargs="+", default=["encode", "decode"], choices=["encode", "decode"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, nargs=3, default=[256, 256, 9], metavar=("HEIGHT", "WIDTH", "FRAMES"))
    parser.add_argument("--base-dim", type=int, default=32)
    parser.add_argument("--tile", type=int, default=128, help="pixels; tiles overlap by a quarter")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    most = max(options.ranks)
    link = run_ranks(most, measured_link)[0] if most > 1 else LINKS["ethernet"]
    found = [row for half in options.halves for row in rows(options, half, link)]
    size = "x".join(map(str, options.size))
    title = f"predicted against measured: base_dim {options.base_dim}, {size}, {options.dtype}; link {link}"
    report(title, found, options.json)


if __name__ == "__main__":
    main()
