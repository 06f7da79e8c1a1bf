"""One rank, every VAE of diffusers, tiny ones: `halovae.optimize(vae)` is never slower than diffusers as it comes.

    python benchmarks/every_vae.py --json benchmarks/results/every-vae.json

The families of the tests, at a picture so large that diffusers' call takes `--seconds`. `x` is the median of the
ratios of neighbouring turns, in seconds of processor time. Few channels gain least: real VAEs are in `one_rank.py`.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import report

import halovae

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from families import FAMILIES, Family, run_decode, run_encode


def call(family: Family, half: str, dtype: torch.dtype, scale: int, ours: bool) -> Callable[[], Any]:
    """A call of one half, on a picture `scale` times as high and wide as the tests' one."""
    sizes = {key: (*shape[:-2], shape[-2] * scale, shape[-1] * scale)
             for key in ("sample_shape", "latent_shape") for shape in [getattr(family, key)]}  # fmt: skip
    family, vae = replace(family, **sizes), family.build().to(dtype)
    if ours:
        halovae.optimize(vae)
    if half == "encode":
        sample = family.sample(dtype)
        return lambda: run_encode(vae, sample)
    latent = family.latent(dtype)
    return lambda: run_decode(family, vae, latent)


def used(one: Callable[[], Any]) -> float:
    started = time.process_time()
    one()
    return time.process_time() - started


def row(family: Family, half: str, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    scale = 1
    while used(call(family, half, dtype, scale, ours=False)) < options.seconds and scale < 16:
        scale *= 2
    own, ours = (call(family, half, dtype, scale, which) for which in (False, True))
    own(), ours()
    turns = [(used(own), used(ours)) for _ in range(options.repeats)]
    return {
        "case": f"{family.name} {str(dtype)[6:]}",
        "half": half,
        "scale": scale,
        "own s": statistics.median(turn[0] for turn in turns),
        "ours s": statistics.median(turn[1] for turn in turns),
        "x": statistics.median(turn[0] / turn[1] for turn in turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--dtypes", nargs="*", default=["float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # diffusers warns of .to(dtype) for an empty list of modules
    rows: list[dict[str, Any]] = []
    for family in map(FAMILIES.__getitem__, options.families):
        for dtype in options.dtypes:
            for half in ("encode", "decode"):
                if getattr(family, half) and getattr(family, f"exact_{half}"):
                    try:
                        rows.append(row(family, half, getattr(torch, dtype), options))
                    except (RuntimeError, ValueError, KeyError) as error:  # some take their own size only
                        keys = ("scale", "own s", "ours s")
                        refusal = dict.fromkeys(keys, "-") | {"x": str(error).split("\n")[0]}
                        rows.append({"case": f"{family.name} {dtype}", "half": half, **refusal})
                    print(rows[-1], file=sys.stderr, flush=True)
    report("every VAE, one rank, one thread", rows, options.json)


if __name__ == "__main__":
    main()
