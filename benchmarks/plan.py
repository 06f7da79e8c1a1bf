"""What `halovae plan` predicts against what is measured, in one run on this machine.

    python benchmarks/plan.py --vae wan21-32 --dtype float32

One thread per rank. The link between the ranks is measured first; then, for each mode and number of ranks, the device
by itself, and at once, since the speed of a shared machine changes by the minute, what it takes. Times are medians of
rounds, of the slowest rank; memory is the growth of the resident memory of a fresh process during one call, on the rank
where it grew most. Goals: 25 % for time, 15 % for memory.

    python benchmarks/plan.py --device cuda --vae wan21-96 --dtype bfloat16 --size 480 832 81 --tile 256 --ranks 1

On accelerators exact mode replays its calls (`graphs=True`), since the host's time is in no prediction, and memory is
what a call allocates without replaying.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from pathlib import Path
from typing import Any

import one_rank
import torch
from harness import EAGER_FREE, interleaved, report, run_ranks

import halovae
from halovae import comm
from halovae.base.memory import PeakMemory
from halovae.calls.target import Target
from halovae.comm.bandwidth import LINKS, LinkSpeed, measure
from halovae.predict.predictor import Predictor
from halovae.predict.rates import MeasuredSpeed

_SHARES = {
    "tile_sample_min_height": 1, "tile_sample_min_width": 1, "tile_sample_stride_height": 3 / 4,
    "tile_sample_stride_width": 3 / 4, "tile_sample_min_size": 1, "tile_latent_min_size": 1 / 8,
}  # fmt: skip
"""What VAEs call the sizes of their tiles, as shares of the size that is asked for."""


def device_of(options: argparse.Namespace) -> torch.device:
    """This rank's."""
    return torch.device(options.device, None if options.device == "cpu" else torch.accelerator.current_device_index())


def build(options: argparse.Namespace) -> Any:
    """The VAE with random weights, the same on every rank, and its tiles."""
    vae = one_rank.build(options.vae, options.dtype).to(device_of(options))
    vae.enable_tiling()
    for name, share in _SHARES.items():
        if hasattr(vae, name):
            setattr(vae, name, int(options.tile * share))
    return vae


def picture(options: argparse.Namespace, half: str) -> torch.Tensor:
    """A sample of this size or its latent; a video's has a quarter of the frames."""
    _, _, sample, latent = one_rank.VAES[options.vae]
    height, width, frames = options.size
    channels, ratio = (sample[0], 1) if half == "encode" else (latent[0], sample[-1] // latent[-1])
    middle = (frames if half == "encode" else (frames - 1) // 4 + 1,) if len(sample) == 4 else ()
    shape = 1, channels, *middle, height // ratio, width // ratio
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return noise.to(device_of(options), getattr(torch, options.dtype))


def ratio_of(options: argparse.Namespace, half: str) -> int:
    """Pixels per latent for encode, 1 for decode."""
    _, _, sample, latent = one_rank.VAES[options.vae]
    return sample[-1] // latent[-1] if half == "encode" else 1


def measured_link(rank: int, options: argparse.Namespace) -> LinkSpeed:
    return measure(comm.connect(), device_of(options))


def predict(
    rank: int, options: argparse.Namespace, half: str, mode: str, ranks: int, link: LinkSpeed
) -> tuple[float, int]:
    """Seconds and bytes of growth."""
    tensor = picture(options, half)
    predictor = Predictor(Target(build(options)), MeasuredSpeed(tensor.device, tensor.dtype), link, frames="auto")
    if mode == "tile":
        found = predictor.tile(half, (tensor,), {}, ranks=ranks)
    else:
        found = predictor.exact(half, (tensor,), {}, ranks=ranks, ratio=ratio_of(options, half))
    return found.seconds, found.memory - tensor.nbytes


def run(vae: Any, half: str, tensor: torch.Tensor) -> None:
    getattr(vae, half)(tensor)
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize()


def time_of(rank: int, options: argparse.Namespace, half: str, mode: str) -> float:
    vae, tensor = build(options), picture(options, half)
    halovae.parallelize(
        vae, mode=mode, verify=False, options=halovae.Options(graphs=mode == "exact" and options.device != "cpu")
    )
    run(vae, half, tensor)  # the second one is recorded, and is a warm-up too
    return interleaved({mode: lambda: run(vae, half, tensor)}, options.repeats)[mode].seconds


def growth_of(rank: int, options: argparse.Namespace, half: str, mode: str) -> int:
    vae, tensor = build(options), picture(options, half)
    halovae.parallelize(vae, mode=mode, verify=False)
    share, step = 5 if mode == "tile" else 2, ratio_of(options, half)
    height, width = (size * share // 8 // step * step for size in tensor.shape[-2:])
    run(vae, half, tensor[..., :height, :width].contiguous())  # libraries load; with tiles there are several
    gc.collect()
    memory = PeakMemory(tensor.device)
    run(vae, half, tensor)
    return memory.growth


def rows(options: argparse.Namespace, half: str, link: LinkSpeed) -> list[dict[str, Any]]:
    on = options.device
    found: list[dict[str, Any]] = []
    for mode, ranks in itertools.product(options.modes, options.ranks):
        seconds, growth = run_ranks(1, predict, options, half, mode, ranks, link, device=on)[0]
        actual = max(run_ranks(ranks, time_of, options, half, mode, device=on))
        grown = max(run_ranks(ranks, growth_of, options, half, mode, env=EAGER_FREE, device=on))
        row = {"half": half, "mode": mode, "ranks": ranks, "predicted s": seconds, "measured s": actual}
        row |= {"time error %": 100 * (seconds / actual - 1), "predicted MiB": growth / 2**20}
        row |= {"measured MiB": grown / 2**20, "memory error %": 100 * (growth / grown - 1)}
        print(row, file=sys.stderr, flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--halves", nargs="+", default=["encode", "decode"], choices=["encode", "decode"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, nargs=3, default=[256, 256, 9], metavar=("HEIGHT", "WIDTH", "FRAMES"))
    parser.add_argument("--vae", default="wan21-32", choices=list(one_rank.VAES))
    parser.add_argument("--tile", type=int, default=128, help="pixels; tiles overlap by a quarter")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modes", nargs="+", default=["exact", "tile"], choices=["exact", "tile"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    most = max(options.ranks)
    link = run_ranks(most, measured_link, options, device=options.device)[0] if most > 1 else LINKS["ethernet"]
    found = [row for half in options.halves for row in rows(options, half, link)]
    size = "x".join(map(str, options.size))
    title = f"predicted against measured: {options.vae}, {size}, {options.dtype}; link {link}"
    report(title, found, options.json)


if __name__ == "__main__":
    main()
