"""The condition of image-to-video, one picture and then blank frames, against a clip of the same size, in one run.

    python benchmarks/condition.py --json benchmarks/results/condition-2core.json

Encoded by diffusers as it comes and by `halovae.optimize`, which computes one of equal frames where a convolution sees
nothing else; on one thread, in turns. `x` is diffusers' seconds over halovae's (medians), `saved` the share of
halovae's seconds for a clip that the condition does not take, `error` the relative L2 distance from diffusers' result.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from exact import build, call
from harness import report, run_ranks

import halovae

CASES = [("bfloat16", (128, 128, 33)), ("float32", (128, 128, 33)), ("float32", (256, 256, 17))]


def measure(rank: int, dtype: str, size: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    case = {"base_dim": 32, "dtype": dtype, "size": size}
    own, ours = build(case), build(case)
    halovae.optimize(ours)
    height, width, frames = size
    clip = torch.randn(1, 3, frames, height, width, generator=torch.Generator().manual_seed(1)).to(own.dtype)
    condition = clip.clone()
    condition[:, :, 1:] = 0
    calls = {
        (name, kind): lambda vae=vae, video=video: call(vae, "encode", video)
        for name, vae in (("diffusers", own), ("halovae", ours))
        for kind, video in (("clip", clip), ("condition", condition))
    }
    results = {key: one().double() for key, one in calls.items()}
    turns = [{key: _seconds(one) for key, one in calls.items()} for _ in range(repeats)]
    seconds = {key: statistics.median(turn[key] for turn in turns) for key in calls}
    expected, found = results["diffusers", "condition"], results["halovae", "condition"]
    return {
        **{f"{name}, {kind} s": value for (name, kind), value in seconds.items()},
        "x": seconds["diffusers", "condition"] / seconds["halovae", "condition"],
        "saved": 1 - seconds["halovae", "condition"] / seconds["halovae", "clip"],
        "error": f"{((found - expected).norm() / expected.norm()).item():.0e}",
    }


def _seconds(one: Callable[[], Any]) -> float:
    started = time.perf_counter()
    one()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype, size in CASES:
        (found,) = run_ranks(1, measure, dtype, size, options.repeats)
        rows.append({"case": f"Wan 2.1, base_dim 32, {dtype} {'x'.join(map(str, size))}", **found})
        print(rows[-1], file=sys.stderr, flush=True)
    report("image-to-video condition, one rank, one thread", rows, options.json)


if __name__ == "__main__":
    main()
