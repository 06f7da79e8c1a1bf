"""MiniMax-H3 in its own tiles on one GPU: diffusers, halovae with diffusers' bits, and halovae as it is, in one run.

    python benchmarks/gpu_tiles.py --frames 209 --halves decode --json benchmarks/results/gpu-tiles.json

The class's real configuration, random weights, bfloat16 but for the modules that diffusers keeps in float32. Seconds
are medians of interleaved rounds after two calls of each way; memory is the most that was allocated during a call
beyond the weights; the distance is the relative one to what diffusers gives.
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
from diffusers.models.autoencoders.autoencoder_kl_minimax_h3 import AutoencoderKLMiniMaxH3
from harness import report

import halovae

HEIGHT, WIDTH = 768, 1344


def build() -> Any:
    torch.manual_seed(0)
    with torch.device("cuda"):
        vae = AutoencoderKLMiniMaxH3()
    kept = set(AutoencoderKLMiniMaxH3._keep_in_fp32_modules)
    for name, parameter in vae.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.bfloat16()
        if name.endswith(("scale1", "scale2")):  # A fresh one has zeros there, and would leave its layers out.
            torch.nn.init.constant_(parameter, 0.1)
    return vae.eval().requires_grad_(False)


def measured(half: str, frames: int, repeats: int) -> list[dict[str, Any]]:
    latents = 5 * ((frames - 5) // 17) + 2
    shape = (1, 24, latents, HEIGHT // 16, WIDTH // 16) if half == "decode" else (1, 3, frames, HEIGHT, WIDTH)
    given = torch.randn(shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    vaes = {way: build() for way in ("diffusers", "same bits", "halovae")}
    halovae.optimize(vaes["same bits"], options=halovae.Options(same_bits=True))
    halovae.optimize(vaes["halovae"])

    def run(way: str) -> Any:
        result = getattr(vaes[way], half)(given)
        return result.sample if half == "decode" else result.latent_dist.parameters

    rows: list[dict[str, Any]] = []
    expected = run("diffusers").float()
    for way in vaes:
        run(way)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = run(way).float()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        distance = ((found - expected).norm() / expected.norm()).item()
        rows.append({"half": half, "frames": frames, "way": way, "GiB": peak, "distance": distance})
        print(rows[-1], f"{seconds(lambda way=way: run(way)):.2f} s", file=sys.stderr, flush=True)
        del found
    turns = [{way: seconds(lambda way=way: run(way)) for way in vaes} for _ in range(repeats)]
    for row in rows:
        row["s"] = statistics.median(turn[row["way"]] for turn in turns)
        row["over diffusers"] = statistics.median(turn["diffusers"] / turn[row["way"]] for turn in turns)
    return rows


def seconds(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=73, help="17 n + 5 of them")
    parser.add_argument("--halves", nargs="*", default=("encode", "decode"), choices=("encode", "decode"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [row for half in options.halves for row in measured(half, options.frames, options.repeats)]
    report(f"one {torch.cuda.get_device_name()}", rows, options.json)


if __name__ == "__main__":
    main()
