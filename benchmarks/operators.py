"""Single operators: torch as it is against the kernels, on one thread, in turns.

python benchmarks/operators.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import report
from torch import Tensor

from halovae.kernels.fast_mode import FastMode, finished

SHAPES = [(32, 6, 128), (64, 4, 64), (128, 3, 32), (96, 6, 96), (384, 3, 32)]
"""Channels, frames (two of them cached), rows and columns."""


def convolution(channels: int, frames: int, size: int, dtype: torch.dtype) -> tuple[Callable[[], Tensor], float]:
    x = torch.randn(1, channels, frames, size, size).to(dtype)
    weight = torch.randn(channels, channels, 3, 3, 3).to(dtype) / 30
    return lambda: F.conv3d(F.pad(x, (1, 1, 1, 1)), weight), 54.0 * channels**2 * (frames - 2) * size**2


def upsampling(channels: int, frames: int, size: int, dtype: torch.dtype) -> tuple[Callable[[], Tensor], float]:
    x, weight = (
        torch.randn(frames, channels, size // 2, size // 2).to(dtype),
        torch.randn(channels // 2, channels, 3, 3),
    )
    weight = weight.to(dtype) / 30
    pair = lambda: F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1)  # noqa: E731
    return pair, 9.0 * channels**2 * frames * size**2


def row(name: str, make: Any, shape: tuple[int, int, int], dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    call, operations = make(*shape, dtype)

    def fast() -> Tensor:
        with FastMode():
            return finished(call())

    seconds: dict[str, list[float]] = {"torch": [], "ours": []}
    for turn in range(repeats + 1):
        for key, one in (("torch", call), ("ours", fast)):
            started = time.process_time()
            one()
            if turn:
                seconds[key].append(time.process_time() - started)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    rates = {f"{key} GFLOP/s": round(operations / value / 1e9) for key, value in medians.items()}
    kind = str(dtype).removeprefix("torch.")
    size = "x".join(map(str, shape))
    return {
        "operator": name,
        "channels x frames x size": size,
        "dtype": kind,
        **rates,
        "x": medians["torch"] / medians["ours"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    makers = {"pad, conv3d": convolution, "nearest x2, conv2d": upsampling}
    with torch.inference_mode():
        rows = [
            row(name, make, shape, getattr(torch, dtype), options.repeats)
            for name, make in makers.items()
            for dtype in options.dtypes
            for shape in SHAPES
        ]
    report("single operators, one thread, processor time", rows, options.json)


if __name__ == "__main__":
    main()
