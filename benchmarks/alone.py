"""Small pictures on several ranks: shards, and what halovae chooses by itself from the fourth call on.

    python benchmarks/alone.py --ranks 2 --json benchmarks/results/alone-2core.json

The architecture of SDXL's VAE with a quarter of its channels and random weights in float32, one thread per rank. "one"
is `halovae.optimize` on the first rank while the others wait. Milliseconds of the slowest rank, medians of the repeats,
in which all ways take turns; "gain" is of the default over shards, "of one" over one rank.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from harness import interleaved, report, run_ranks

import halovae


def build() -> Any:
    torch.manual_seed(0)
    blocks = 4
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, norm_num_groups=32,
    )  # fmt: skip
    return vae.eval().requires_grad_(False)


def measure(rank: int, sides: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    return [row(rank, half, side, repeats) for half in ("encode", "decode") for side in sides]


def row(rank: int, half: str, side: int, repeats: int) -> dict[str, Any]:
    shape = (1, 3, side, side) if half == "encode" else (1, 4, side // 8, side // 8)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    vaes = {name: build() for name in ("one", "shards", "default")}
    halovae.optimize(vaes["one"])
    halovae.parallelize(vaes["shards"], options=halovae.Options(alone=False))
    handle = halovae.parallelize(vaes["default"])

    def call(name: str) -> None:
        if name != "one" or rank == 0:
            getattr(vaes[name], half)(tensor)

    trial = 0.0
    for name in vaes:
        for _ in range(4):
            call(name)
            trial = max(trial, handle.last.phases.get("trial", 0.0) if handle.last else 0.0)
    spent = interleaved({name: lambda name=name: call(name) for name in vaes}, repeats)
    last = handle.last
    assert last is not None
    for vae in vaes.values():
        halovae.restore(vae)
    return {
        "half": half, "picture": f"{side}x{side}", **{f"{name} ms": 1e3 * each.seconds for name, each in spent.items()},
        "gain": spent["shards"].over(spent["default"]), "of one": spent["one"].over(spent["default"]),
        "default is": "alone" if last.alone else "shards", "trial ms": 1e3 * trial,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    each = run_ranks(options.ranks, measure, options.sides, options.repeats, env={"HALOVAE_CACHE": "off"})
    rows = [max(ranks, key=lambda row: row["default ms"]) for ranks in zip(*each, strict=True)]
    report(f"small pictures on {options.ranks} ranks", rows, options.json)


if __name__ == "__main__":
    main()
