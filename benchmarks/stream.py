"""Frames as they come: streams and sessions of both halves against one call, and against clips that are cut by hand.

    python benchmarks/stream.py --ranks 1 2 --json benchmarks/results/stream-2core.json
    python benchmarks/stream.py --device cuda --frames 21 201

Wan 2.1 with random weights. `first` is when the first frames are there, `first/call` their share of the time of one
call; `stream/call`, `parts/call` (a stream that reads an iterator) and `session/call` are for the whole clip. Memory is
the growth during one call in fresh processes, on the first rank. `by hand` is what one can do without a stream: some
frames at a time with one more before them, whose result is thrown away; `its error` is how far that is from the call,
relative in L2.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from harness import EAGER_FREE, report, run_ranks

import halovae
from halovae.base.memory import PeakMemory

SIZES = {"cpu": (32, 16, 16, "float32"), "cuda": (96, 60, 104, "bfloat16")}
"""Width of the network, rows and columns of the latents, dtype."""
AT_ONCE = 4
"""Latent frames in a part that is cut by hand."""


def build(device: str, half: str, frames: int) -> tuple[Any, torch.Tensor]:
    """A VAE, and latents or the clip that has so many latent frames."""
    width, rows, cols, name = SIZES[device]
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    dtype = getattr(torch, name)
    vae = AutoencoderKLWan(base_dim=width).to(device, dtype).eval().requires_grad_(False)
    shape = (1, 16, frames, rows, cols) if half == "decode" else (1, 3, 4 * frames - 3, 8 * rows, 8 * cols)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return vae, given.to(device, dtype)


def tensor_of(piece: Any) -> torch.Tensor:
    """Frames, or the parameters of a distribution of latents."""
    return piece if torch.is_tensor(piece) else piece.sample if "sample" in piece else piece.latent_dist.parameters


def one_call(vae: Any, handle: halovae.Handle, half: str, given: torch.Tensor) -> Iterator[torch.Tensor]:
    yield tensor_of(getattr(vae, half)(given))


def stream(vae: Any, handle: halovae.Handle, half: str, given: torch.Tensor) -> Iterator[torch.Tensor]:
    made = handle.decode_stream(given) if half == "decode" else handle.encode_stream(given.split(1, 2))
    yield from map(tensor_of, made)


def session(vae: Any, handle: halovae.Handle, half: str, given: torch.Tensor) -> Iterator[torch.Tensor]:
    with handle.session() as going:
        for part in (given[:, :, :1], *given[:, :, 1:].split(step(half), 2)):
            yield tensor_of(getattr(going, half)(part))


def by_hand(vae: Any, handle: halovae.Handle, half: str, given: torch.Tensor) -> Iterator[torch.Tensor]:
    parts = (given[:, :, :1], *given[:, :, 1:].split(AT_ONCE * step(half), 2))
    for before, part in zip((None, *parts), parts, strict=False):
        joined = part if before is None else torch.cat([before[:, :, -1:], part], 2)
        yield tensor_of(getattr(vae, half)(joined))[:, :, 0 if before is None else 1 :]


def step(half: str) -> int:
    """Frames of a step in time."""
    return 1 if half == "decode" else 4


def parts(vae: Any, handle: halovae.Handle, half: str, given: torch.Tensor) -> Iterator[torch.Tensor]:
    made = handle.decode_stream if half == "decode" else handle.encode_stream
    yield from map(tensor_of, made(iter(given.split(1, 2))))


WAYS: dict[str, Callable[..., Iterator[torch.Tensor]]] = {
    "call": one_call, "stream": stream, "parts": parts, "session": session, "by hand": by_hand,
}  # fmt: skip


def timed(way: str, *given: Any) -> tuple[float, float]:
    """Seconds to the first frames, and to the last."""
    started, first = time.perf_counter(), 0.0
    for frames in WAYS[way](*given):
        if frames.is_cuda:
            torch.cuda.synchronize()
        first = first or time.perf_counter() - started
        del frames
    return first, time.perf_counter() - started


def measure_time(rank: int, device: str, half: str, frames: int, repeats: int) -> dict[str, Any]:
    vae, clip = build(device, half, frames)
    with halovae.parallelize(vae) as handle:
        given = vae, handle, half, clip
        whole = {way: torch.cat([part.cpu() for part in make(*given)], 2).double() for way, make in WAYS.items()}
        for way in ("stream", "parts"):
            assert torch.equal(whole[way], whole["call"]), way
        # A session joins steps within each of its calls, so its last bits may be others.
        error, by_session = (
            (whole[way] - whole["call"]).norm() / whole["call"].norm() for way in ("by hand", "session")
        )
        count = whole["call"].shape[2]
        del whole
        turns = [{way: timed(way, *given) for way in WAYS} for _ in range(repeats)]
    whole_call = statistics.median(turn["call"][1] for turn in turns)
    return {
        "frames": count,
        "call s": whole_call,
        "first s": statistics.median(turn["stream"][0] for turn in turns),
        "first/call": statistics.median(turn["stream"][0] / turn["call"][1] for turn in turns),
        "stream/call": statistics.median(turn["stream"][1] / turn["call"][1] for turn in turns),
        "parts/call": statistics.median(turn["parts"][1] / turn["call"][1] for turn in turns),
        "session/call": statistics.median(turn["session"][1] / turn["call"][1] for turn in turns),
        "session's error": by_session.item(),
        "by hand/call": statistics.median(turn["by hand"][1] / turn["call"][1] for turn in turns),
        "its error": error.item(),
    }


def measure_memory(rank: int, device: str, half: str, frames: int, way: str) -> float:
    vae, given = build(device, half, frames)
    with halovae.parallelize(vae, verify=False) as handle:
        timed(way, vae, handle, half, given[:, :, : 1 + 2 * step(half)])  # What libraries and weights take once.
        gc.collect()
        memory = PeakMemory(given.device)
        timed(way, vae, handle, half, given)
        return memory.growth / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=list(SIZES))
    parser.add_argument("--ranks", type=int, nargs="*", default=[1])
    parser.add_argument("--frames", type=int, nargs="*", default=[21], help="latent frames")
    parser.add_argument("--halves", nargs="*", default=["decode", "encode"], choices=["decode", "encode"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for ranks in options.ranks:
        for half, frames in itertools.product(options.halves, options.frames):
            given = options.device, half, frames
            row = run_ranks(ranks, measure_time, *given, options.repeats, device=options.device)[0]
            mib = {
                way: run_ranks(ranks, measure_memory, *given, way, env=EAGER_FREE, device=options.device)[0]
                for way in ("call", "stream")
            }
            memory = {f"{way} MiB": round(growth) for way, growth in mib.items()}
            rows.append({"half": half, "ranks": ranks, **row, **memory, "memory": mib["stream"] / mib["call"]})
    report("Wan 2.1 in pieces", rows, options.json)


if __name__ == "__main__":
    main()
