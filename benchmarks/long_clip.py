"""The memory of `halovae roundtrip` for a clip and for one that is ten times as long, on every rank.

    python benchmarks/long_clip.py --ranks 2 --json benchmarks/results/long-clip-2core.json
    python benchmarks/long_clip.py --serve --frames 33 --times 20 --height 64 --width 96

Wan 2.1 with few channels and random weights; clips of moving noise. A peak is the most that the process of a rank held
while it encoded and decoded, with Python, libraries and weights; on the first rank the writer is in it. With --serve,
it is that of a server and its ranks, with the demonstration model, while a client streams the clip through encode and
decode of the VAE.
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
import psutil
from diffusers import AutoencoderKLWan
from harness import report
from numpy.typing import NDArray
from serving import halovae, served

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


def served_peaks(folder: Path, clip: Path, ranks: int) -> list[int]:
    """Bytes of the process that clients talk to, and rank by rank."""
    latents, more = folder / "latents.safetensors", {"data": {"stream": "true"}}
    halovae("encode", str(clip), "-o", str(latents), "--model", str(folder / "demo" / "vae"))
    options = ("--ranks", str(ranks), "--max-frames", "100000", "--max-upload", "1000")
    with tempfile.TemporaryDirectory() as store, served(folder / "demo", Path(store), *options) as (client, server):
        for route, name, path in (("encode", "clip", clip), ("decode", "latents", latents)):
            with (
                path.open("rb") as file,
                client.stream("POST", f"/v1/vae/{route}", files={name: file}, **more) as answer,
            ):
                size = sum(map(len, answer.iter_raw()))
            if answer.status_code != 200:
                raise SystemExit(f"{route}: {answer.status_code}")
            print(f"{route}: {size} bytes")
        processes = [server, *sorted(child.pid for child in psutil.Process(server).children())]
        return [_peak(process) for process in processes]


def _peak(process: int) -> int:
    words = Path(f"/proc/{process}/status").read_text().split("VmHWM:")[1].split()
    return int(words[0]) * 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--frames", type=int, default=81, help="of the short clip")
    parser.add_argument("--times", type=int, default=10, help="how much longer the long one is")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--serve", action="store_true", help="through a server")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    height, width = options.height, options.width
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        vae.save_pretrained(folder / "vae")
        if options.serve:
            halovae("make-demo-model", str(folder / "demo"))
        found: list[list[int]] = []
        for count in (options.frames, options.frames * options.times):
            media.write(folder / "clip.mp4", frames(count, height, width), Fraction(16))
            clip = folder / "clip.mp4"
            found.append(
                served_peaks(folder, clip, options.ranks)
                if options.serve
                else peaks(folder, folder / "vae", clip, options.ranks)
            )
    names = [*(["server"] if options.serve else []), *range(options.ranks)]
    rows = [
        {
            "rank": names[rank], "frames": options.frames, "size": f"{width}x{height}",
            "MiB": round(short / 2**20), f"MiB, {options.times} times": round(long / 2**20), "ratio": long / short,
        }
        for rank, (short, long) in enumerate(zip(*found, strict=True))
    ]  # fmt: skip
    report(f"{'server' if options.serve else 'roundtrip'}: a long clip", rows, options.json)


if __name__ == "__main__":
    main()
