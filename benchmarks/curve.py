"""Exact mode on 1, 2, 4, 8, ... ranks of one host, for a machine with a core for each of them.

    python benchmarks/curve.py --ranks 1 2 4 8 --json benchmarks/results/curve.json

One thread per rank; one rank is `halovae.parallelize` in a world of one, with the same kernels. `allowed` is what the
host allows: each rank runs `halovae.optimize` on a picture of its own of the size of a shard, at the same time and
without communication. Seconds are of the slowest rank, medians of the repeats, in which both take turns; speed-ups are
over exact mode on the first of `--ranks`, and `of allowed` compares the two.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

from exact import build, call, picture
from harness import interleaved, report, run_ranks
from torch import Tensor

import halovae


def measure(rank: int, case: dict[str, Any], half: str, repeats: int) -> dict[str, Any]:
    vae, alone, tensor = build(case), build(case), picture(case, half)
    handle = halovae.parallelize(vae, verify=False)
    halovae.optimize(alone)

    @functools.cache
    def part() -> Tensor:
        """Of the size of a shard, which the first exact call tells."""
        assert handle.last is not None
        (rows, columns), (height, width, frames) = handle.last.shape, case["size"]
        return picture(case | {"size": (height // rows, width // columns, frames)}, half)

    variants = {"exact": lambda: call(vae, half, tensor), "allowed": lambda: call(alone, half, part())}
    seconds = {name: spent.seconds for name, spent in interleaved(variants, repeats).items()}
    last = handle.last
    assert last is not None
    return {**seconds, "grid": "x".join(map(str, last.shape)), "messages": last.messages, "wait s": last.wait_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--halves", nargs="+", default=["encode", "decode"], choices=["encode", "decode"])
    parser.add_argument("--size", type=int, nargs=3, default=[480, 832, 5], metavar=("HEIGHT", "WIDTH", "FRAMES"))
    parser.add_argument("--base-dim", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    case = {"base_dim": options.base_dim, "dtype": options.dtype, "size": tuple(options.size)}
    rows: list[dict[str, Any]] = []
    for half in options.halves:
        first = 0.0
        for ranks in options.ranks:
            slowest = max(run_ranks(ranks, measure, case, half, options.repeats), key=lambda found: found["exact"])
            first = first or slowest["exact"]
            compared = {
                "speed-up": first / slowest["exact"],
                "speed-up allowed": first / slowest["allowed"],
                "of allowed": slowest["allowed"] / slowest["exact"],
            }
            rows.append({"half": half, "ranks": ranks, **slowest, **compared})
            print(rows[-1], file=sys.stderr, flush=True)
    size = "x".join(map(str, options.size))
    report(f"exact mode, Wan 2.1, base_dim {options.base_dim}, {options.dtype}, {size}", rows, options.json)


if __name__ == "__main__":
    main()
