"""The memory of the command line, or of a server, for a clip and for one that is many times as long, on every rank.

    python benchmarks/long_clip.py --ranks 2 --json benchmarks/results/long-clip-2core.json
    python benchmarks/long_clip.py --serve --frames 33 --times 20 --height 64 --width 96
    python benchmarks/long_clip.py --device cuda --commands encode,decode          ten seconds and ten minutes, 480x832

Wan 2.1 of random weights: with few channels, or on a GPU of its full width in bfloat16. The clips are moving noise, the
longer one the shorter one again and again; so are the latents that `decode` gets.

`MiB` is the most that a rank held while it encoded and decoded: on a GPU of its memory, as torch counts it; on a CPU
of the process, with Python, libraries and weights. `host MiB` is the most that any process of the command held: that
of the first rank has the reader and the writer in it. With --serve it is that of a server and its ranks, with the
demonstration model, while a client streams the clip through encode and decode of the VAE.

The table and the JSON are made anew after each command. One that takes longer than `--limit` is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import psutil
import torch
from diffusers import AutoencoderKLWan
from harness import report
from numpy.typing import NDArray

from halovae import media
from halovae.media import latents_file

FPS = 16


def frames(count: int, height: int, width: int) -> Iterator[NDArray[np.uint8]]:
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    still = noise.repeat(8, 0).repeat(8, 1)
    for number in range(count):
        yield np.roll(still, 2 * number, 1)


def repeat_clip(short: Path, long: Path, times: int) -> None:
    """A video again and again, without encoding it anew."""
    with av.open(str(long), "w") as output, av.open(str(short)) as first:
        stream = output.add_stream_from_template(first.streams.video[0])
        length = round(first.streams.video[0].frames / FPS / first.streams.video[0].time_base)
        for turn in range(times):
            with av.open(str(short)) as source:
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.pts, packet.dts = packet.pts + turn * length, packet.dts + turn * length
                        packet.stream = stream
                        output.mux(packet)


def repeat_latents(short: Path, long: Path, times: int) -> None:
    latents, info = latents_file.load(short)
    count, period = info.frames * times, (info.padded_frames - 1) // (latents.shape[2] - 1)
    # One frame, and then so many for each further one.
    wanted = 1 + -(-(count - 1) // period)
    with latents_file.LatentsWriter(long, 2) as writer:
        for begin in range(0, wanted, latents.shape[2]):
            writer.put(latents[:, :, : wanted - begin])
        writer.finish(replace(info, frames=count, padded_frames=1 + (wanted - 1) * period))


class Held(NamedTuple):
    ranks: list[int]
    """Bytes, rank by rank."""
    host: int
    """Bytes of the largest process."""
    seconds: float


def peaks(words: list[Any], folder: Path, limit: float) -> Held | None:
    """None: out of time."""
    told = folder / "told.json"
    began = time.monotonic()
    command = subprocess.Popen([sys.executable, "-m", "halovae", *map(str, words), "--json", str(told)])
    while (ended := os.wait4(command.pid, os.WNOHANG))[0] == 0:
        time.sleep(0.1)
        if time.monotonic() - began > limit:
            command.send_signal(signal.SIGINT)  # It ends its ranks.
            time.sleep(5)
            command.kill()
            command.wait()
            return None
    command.returncode = os.waitstatus_to_exitcode(ended[1])
    if command.returncode:
        raise SystemExit(f"{words[0]}: exit code {command.returncode}")
    ranks = json.loads(told.read_text())["per_rank"]
    highest = [max(half["peak_memory"] for half in rank.values()) for rank in ranks]
    return Held(highest, ended[2].ru_maxrss * 2**10, time.monotonic() - began)


def served_peaks(folder: Path, clip: Path, ranks: int) -> list[int]:
    """Bytes of the process that clients talk to, and rank by rank."""
    from serving import halovae, served

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


def of_server(given: argparse.Namespace, folder: Path, clips: list[Path]) -> None:
    from serving import halovae

    halovae("make-demo-model", str(folder / "demo"))
    found = [served_peaks(folder, clip, given.ranks) for clip in clips]
    rows = [
        {"process": name, "MiB": short / 2**20, f"MiB, {given.times} times": long / 2**20, "ratio": long / short}
        for name, short, long in zip(["server", *range(given.ranks)], *found, strict=True)
    ]
    report(f"server: {given.frames} frames of {given.width}x{given.height}", rows, given.json)


def of_commands(given: argparse.Namespace, folder: Path, clips: list[Path]) -> None:
    on_cpu = given.device == "cpu"
    torch.manual_seed(0)
    small = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    vae = AutoencoderKLWan(z_dim=16, temperal_downsample=[False, True, True], **(small if on_cpu else {}))
    vae.to(torch.float32 if on_cpu else torch.bfloat16).save_pretrained(folder / "vae")
    options = ["--model", folder / "vae", "--device", given.device, "--ranks", given.ranks]
    latents = [folder / f"latents-{number}.safetensors" for number in range(2)]
    outputs = {"encode": latents[0], "decode": folder / "out.mp4", "roundtrip": folder / "out.mp4"}
    rows: list[dict[str, Any]] = []
    for name in given.commands.split(","):
        sources = clips
        if name == "decode":
            if not latents[0].exists():
                peaks(["encode", clips[0], "-o", latents[0], *options], folder, given.limit)
            repeat_latents(latents[0], latents[1], given.times)
            sources = latents
        held: list[Held | None] = []
        for number, source in enumerate(sources):
            # The latents of the short clip stay, for `decode`.
            output = latents[1] if name == "encode" and number else outputs[name]
            held.append(peaks([name, source, "-o", output, *options], folder, given.limit))
            print(name, number, held[-1], flush=True)
        short, long = held
        if short is None or long is None:
            print(f"{name}: no result after {given.limit:.0f} s", flush=True)
            continue
        for rank, (few, many) in enumerate(zip(short.ranks, long.ranks, strict=True)):
            rows.append(
                {
                    "command": name, "rank": rank, "MiB": few / 2**20, f"MiB, {given.times} times": many / 2**20,
                    "ratio": many / few, "host MiB": short.host / 2**20,
                    f"host MiB, {given.times} times": long.host / 2**20, "host ratio": long.host / short.host,
                    "seconds": short.seconds, f"seconds, {given.times} times": long.seconds,
                }
            )  # fmt: skip
        report(f"{given.frames} frames of {given.width}x{given.height} on {given.device}", rows, given.json)
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="default: 2, or 1 on a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commands", default="roundtrip", help="of encode,decode,roundtrip")
    parser.add_argument("--frames", type=int, help="of the short clip; default: 81, or 160 on a GPU: ten seconds")
    parser.add_argument("--times", type=int, help="how much longer the long one is; default: 10, or 60 on a GPU")
    parser.add_argument("--height", type=int, help="default: 128, or 480 on a GPU")
    parser.add_argument("--width", type=int, help="default: 192, or 832 on a GPU")
    parser.add_argument("--serve", action="store_true", help="through a server")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for each command")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    usual = {"ranks": (2, 1), "frames": (81, 160), "times": (10, 60), "height": (128, 480), "width": (192, 832)}
    for name, both in usual.items():
        if getattr(given, name) is None:
            setattr(given, name, both[given.device != "cpu"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clips = [folder / "short.mp4", folder / "long.mp4"]
        media.write(clips[0], frames(given.frames, given.height, given.width), Fraction(FPS))
        repeat_clip(*clips, given.times)
        (of_server if given.serve else of_commands)(given, folder, clips)


if __name__ == "__main__":
    main()
