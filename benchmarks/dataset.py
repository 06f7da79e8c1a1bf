"""A folder of clips to latents: `halovae encode-dataset` against tensors in memory, and against a plain loop.

    python benchmarks/dataset.py --json benchmarks/results/dataset.json
    python benchmarks/dataset.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --bucket 480x832x81 --clips 40 \\
        --dtype bfloat16 --devices 1,2,4

`memory` is the VAE after `halovae.optimize` on clips that are decoded already, one by one. `loop` is PyAV, Pillow,
diffusers' own encode and `torch.save`. `dataset` is the command with a local Ray on `--devices`; its rate is counted
from its first file to its last, since the start of Ray and of the devices' processes is paid once, and told beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from harness import report
from PIL import Image

import halovae
from halovae import media
from halovae.app.session import device_kind
from halovae.datasets.buckets import Bucket, parse_buckets, take
from halovae.datasets.items import find_items
from halovae.datasets.units import together
from halovae.media import codec, models, vae_limits

SOURCE = Path(__file__).parents[1] / "media" / "bigbuckbunny.mp4"


def make_clips(folder: Path, bucket: Bucket, count: int) -> None:
    """Clips a little larger than the bucket, each of other frames."""
    height, width = bucket.height * 5 // 4, bucket.width * 5 // 4
    frames = media.read(SOURCE, height=height + height % 2, width=width + width % 2).frames
    for number in range(count):
        chosen = np.arange(7 * number, 7 * number + bucket.frames) % len(frames)
        media.write(folder / f"{number:04}.mp4", frames[chosen], Fraction(25))


def load(model: str | None, device: str, dtype: str) -> tuple[Any, vae_limits.Limits]:
    vae = models.load(models.find(model), dtype=getattr(torch, dtype), device=torch.device(device))
    return vae, vae_limits.limits_of(vae)


def rate(work: Callable[[Path], Any], paths: list[Path], device: str) -> float:
    """Clips per minute, after one for warm-up."""
    work(paths[0])
    started = time.perf_counter()
    for path in paths[1:]:
        work(path)
    if device != "cpu":
        torch.accelerator.synchronize()
    return 60 * (len(paths) - 1) / (time.perf_counter() - started)


def in_memory(given: argparse.Namespace, folder: Path, bucket: Bucket) -> float:
    vae, limits = load(given.model, given.device, given.dtype)
    items = find_items(str(folder))
    clips = {Path(item.path): take(item, bucket, None).pixels for item in items}
    tensors = {
        path: codec.to_tensor(pixels, getattr(torch, given.dtype), torch.device(given.device))
        for path, pixels in clips.items()
    }
    with halovae.optimize(vae), torch.inference_mode():
        return rate(lambda path: codec.encode(vae, limits, tensors[path]).cpu(), list(tensors), given.device)


def plain_loop(given: argparse.Namespace, folder: Path, bucket: Bucket) -> float:
    vae, _ = load(given.model, given.device, given.dtype)

    def work(path: Path) -> None:
        with av.open(str(path)) as container:
            images = [frame.to_image() for _, frame in zip(range(bucket.frames), container.decode(video=0))]  # noqa: B905
        resized = [image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS) for image in images]
        clip = torch.from_numpy(np.stack([np.asarray(image) for image in resized]))
        clip = clip.to(given.device).to(getattr(torch, given.dtype)) / 127.5 - 1
        torch.save(vae.encode(clip.permute(3, 0, 1, 2)[None]).latent_dist.mode().cpu(), folder / f"{path.stem}.pt")

    with torch.inference_mode():
        return rate(work, sorted(folder.glob("*.mp4")), given.device)


def dataset(given: argparse.Namespace, folder: Path, bucket: Bucket, devices: int) -> tuple[float, float]:
    """Clips per minute, and the seconds that the whole command takes."""
    output = folder / f"latents-{devices}"
    words = [
        "encode-dataset",
        str(folder / "*.mp4"),
        "-o",
        str(output),
        "--bucket",
        str(bucket),
        "--dtype",
        given.dtype,
    ]
    words += ["--device", given.device, "--devices", str(devices), *(["--model", given.model] if given.model else [])]
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "halovae", *words], check=True)
    seconds = time.perf_counter() - started
    ends = sorted(path.stat().st_mtime for path in (output / "latents").iterdir())
    # The first unit of each device warms it up, and clips of a unit are written at one time.
    first = devices * together(bucket)
    return 60 * (len(ends) - first) / (ends[-1] - ends[first - 1]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--bucket", default="128x192x17")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--device", default=device_kind(None))
    parser.add_argument("--devices", default="1", help="such as 1,2,4")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    (bucket,) = parse_buckets([given.bucket])
    least = 6 * together(bucket) * max(map(int, given.devices.split(",")))
    if given.clips < least:
        parser.error(f"--clips {given.clips}: {least} at least, else the rate is that of a burst")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_clips(folder, bucket, given.clips)
        memory = in_memory(given, folder, bucket)
        loop = plain_loop(given, folder, bucket)
        rows = [{"way": "memory", "clips/min": memory, "of memory": 1.0, "of loop": memory / loop, "command, s": "-"}]
        rows.append({"way": "loop", "clips/min": loop, "of memory": loop / memory, "of loop": 1.0, "command, s": "-"})
        for devices in map(int, given.devices.split(",")):
            found, seconds = dataset(given, folder, bucket, devices)
            row = {"way": f"dataset, {devices} {given.device}", "clips/min": found, "of memory": found / memory}
            rows.append({**row, "of loop": found / loop, "command, s": seconds})
    report(
        f"{given.clips} clips of {bucket}, {given.model or 'the demonstration VAE'}, {given.dtype}", rows, given.json
    )


if __name__ == "__main__":
    main()
