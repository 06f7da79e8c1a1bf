"""The memory of `halovae roundtrip` for a clip and for one that is ten times as long, on every rank.

    python benchmarks/long_clip.py --ranks 2 --json benchmarks/results/long-clip-2core.json

Wan 2.1 with few channels and random weights; clips of moving noise. A peak is the most that the process of a rank held
while it encoded and decoded, with Python, libraries and weights; on the first rank the writer is in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKLWan
from harness import report
from numpy.typing import NDArray

from halovae import media


def frames(count: int, height: int, width: int) -> Iterator[NDArray[np.uint8]]:
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    still = noise.repeat(8, 0).repeat(8, 1)
    for number in range(count):
        yield np.roll(still, 2 * number, 1)


def peaks(folder: Path, model: Path, clip: Path, ranks: int) -> list[int]:
    """Bytes, rank by rank."""
    words = [
        "roundtrip",
        clip,
        "-o",
        folder / "out.mp4",
        "--model",
        model,
        "--ranks",
        ranks,
        "--json",
        folder / "o.json",
    ]
    subprocess.run([sys.executable, "-m", "halovae", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    found = json.loads((folder / "o.json").read_text())["per_rank"]
    return [max(half["peak_memory"] for half in rank.values()) for rank in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--frames", type=int, default=81, help="of the short clip")
    parser.add_argument("--times", type=int, default=10, help="how much longer the long one is")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    height, width = options.height, options.width
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        vae.save_pretrained(folder / "vae")
        found: list[list[int]] = []
        for count in (options.frames, options.frames * options.times):
            media.write(folder / "clip.mp4", frames(count, height, width), Fraction(16))
            found.append(peaks(folder, folder / "vae", folder / "clip.mp4", options.ranks))
    rows = [
        {
            "rank": rank, "frames": options.frames, "size": f"{width}x{height}",
            "MiB": round(short / 2**20), f"MiB, {options.times} times": round(long / 2**20), "ratio": long / short,
        }
        for rank, (short, long) in enumerate(zip(*found, strict=True))
    ]  # fmt: skip
    report("roundtrip of a long clip", rows, options.json)


if __name__ == "__main__":
    main()
