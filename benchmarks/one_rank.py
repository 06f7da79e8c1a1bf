"""One rank: `halovae.optimize(vae)` against diffusers as it comes, in one run.

    python benchmarks/one_rank.py --json benchmarks/results/one-rank.json

Both take turns in one process: `x` is the median of the ratios of neighbouring turns, in seconds of the clock, and
`x cpu` in seconds of processor time, which other work on the machine disturbs less. Memory is the growth of the
resident memory of a fresh process during one call, weights made for the call among it. `error` is the relative L2
difference; `own error` is how far diffusers' result itself is from the same weights in float64, and `our error` ours.
"""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from harness import EAGER_FREE, report, resident, run_ranks

import halovae
from halovae.base.memory import PeakMemory

WAN22 = {"z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
         "scale_factor_spatial": 16}  # fmt: skip
GROUPED = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
VAES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "wan21-32": ("AutoencoderKLWan", {"base_dim": 32}, (3, 17, 128, 128), (16, 5, 16, 16)),
    "wan21-96": ("AutoencoderKLWan", {"base_dim": 96}, (3, 5, 128, 128), (16, 2, 16, 16)),
    "wan22-32": ("AutoencoderKLWan", {"base_dim": 32, "decoder_base_dim": 48, **WAN22},
                 (3, 9, 256, 256), (48, 3, 16, 16)),
    "wan22-96": ("AutoencoderKLWan", {"base_dim": 96, "decoder_base_dim": 144, **WAN22},
                 (3, 5, 256, 256), (48, 2, 16, 16)),
    "kl": ("AutoencoderKL", {**GROUPED, "down_block_types": ("DownEncoderBlock2D",) * 4,
           "up_block_types": ("UpDecoderBlock2D",) * 4}, (3, 256, 256), (4, 32, 32)),
    "qwenimage": ("AutoencoderKLQwenImage", {"base_dim": 32}, (3, 1, 256, 256), (16, 1, 32, 32)),
    "hunyuan_video": ("AutoencoderKLHunyuanVideo", {"block_out_channels": (32, 64, 128, 128)},
                      (3, 9, 128, 128), (16, 3, 16, 16)),
}  # fmt: skip
"""Class, config, and the shapes of sample and latent."""
SMALLER = {("kl", "bfloat16"): 8, ("qwenimage", "bfloat16"): 2}
"""What height and width are divided by on a processor without instructions for bfloat16: torch's convolutions of
single pictures run at 0.5 GFLOP/s there and would take minutes."""


def build(name: str, dtype: str) -> Any:
    """The VAE with random weights; the same at each call."""
    model, config, _, _ = VAES[name]
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # diffusers warns of .to(dtype) for an empty list of modules
    return getattr(diffusers, model)(**config).to(getattr(torch, dtype)).eval().requires_grad_(False)


def picture(name: str, dtype: str, half: str) -> torch.Tensor:
    *outer, height, width = VAES[name][2 if half == "encode" else 3]
    divisor = 1 if _has_bfloat16() else SMALLER.get((name, dtype), 1)
    shape = (1, *outer, height // divisor, width // divisor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))


@functools.cache
def _has_bfloat16() -> bool:
    described = Path("/proc/cpuinfo")
    return described.exists() and any(flag in described.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def call(vae: Any, half: str, tensor: torch.Tensor) -> torch.Tensor:
    return vae.encode(tensor).latent_dist.parameters if half == "encode" else vae.decode(tensor).sample


def measure_time(
    rank: int, name: str, dtype: str, half: str, repeats: int, threads: int, truth: bool
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    own, ours, tensor = build(name, dtype), build(name, dtype), picture(name, dtype, half)
    halovae.optimize(ours)
    calls = {"own": lambda: call(own, half, tensor), "ours": lambda: call(ours, half, tensor)}
    results = {key: one() for key, one in calls.items()}
    errors = {"error": f"{_distance(results['ours'], results['own']):.0e}"}
    if truth:
        exact = call(build(name, dtype).double(), half, tensor.double())
        errors |= {f"{key[:3]} error": f"{_distance(found, exact):.0e}" for key, found in results.items()}
    turns = [{key: _timed(one) for key, one in calls.items()} for _ in range(repeats)]
    ratios = [[turn["own"][clock] / turn["ours"][clock] for turn in turns] for clock in (0, 1)]
    return {
        "own s": statistics.median(turn["own"][0] for turn in turns),
        "ours s": statistics.median(turn["ours"][0] for turn in turns),
        "x": statistics.median(ratios[0]),
        "x cpu": statistics.median(ratios[1]),
        **errors,
    }


def _timed(one: Callable[[], Any]) -> tuple[float, float]:
    wall, used = time.perf_counter(), time.process_time()
    one()
    return time.perf_counter() - wall, time.process_time() - used


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(found.double() - expected.double()) / expected.double().norm()).item()


def measure_memory(rank: int, name: str, dtype: str, half: str, ours: bool, threads: int) -> int:
    torch.set_num_threads(threads)
    vae, tensor = build(name, dtype), picture(name, dtype, half)
    if ours:
        halovae.optimize(vae)
    torch.nn.functional.conv2d(torch.ones(1, 8, 8, 8), torch.ones(8, 8, 3, 3))  # the library loads
    gc.collect()
    before, memory = resident(), PeakMemory(torch.device("cpu"))
    call(vae, half, tensor)
    return (memory.read() or 0) - before


def row(name: str, dtype: str, half: str, options: argparse.Namespace) -> dict[str, Any]:
    threads = options.threads
    (times,) = run_ranks(1, measure_time, name, dtype, half, options.repeats, threads, options.truth)
    found: dict[str, Any] = {"case": f"{name} {dtype}", "half": half, **times}
    if options.memory:
        own, ours = (
            run_ranks(1, measure_memory, name, dtype, half, which, threads, env=EAGER_FREE)[0] / 2**20
            for which in (False, True)
        )
        found |= {"own MiB": round(own), "ours MiB": round(ours), "memory": ours / own}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vaes", nargs="*", default=list(VAES), choices=list(VAES))
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory too")
    parser.add_argument("--truth", action=argparse.BooleanOptionalAction, default=True, help="compare with float64")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.vaes:
        for dtype in options.dtypes:
            for half in ("encode", "decode"):
                rows.append(row(name, dtype, half, options))
                print(rows[-1], file=sys.stderr, flush=True)
    report(f"one rank, {options.threads} thread(s)", rows, options.json)


if __name__ == "__main__":
    main()
