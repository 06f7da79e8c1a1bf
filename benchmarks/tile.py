"""Tiles of diffusers on one rank against the same tiles on N ranks, and exact mode, in one run.

    python benchmarks/tile.py --ranks 2 --repeats 5 --json tile.json

All ways are timed in turn, so that they meet the same disturbances; each number is a median. "pad and gather" restates
what other projects do with tiles: every tile is padded to the largest, all are gathered by all, and rank 0 blends.
"independent" runs diffusers' tiles on all ranks at once without talking: it shows what the machine allows. "difference"
is from diffusers on one rank, "x tile" how much faster than halovae's tiles. The defaults take about four minutes.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import AutoencoderKLWan
from harness import report

import halovae
from halovae import comm
from halovae.calls.target import Target
from halovae.tiles.tile_runner import TileRunner


def build(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=options.base_dim, z_dim=16, num_res_blocks=2)
    vae = vae.to(options.device, getattr(torch, options.dtype)).eval().requires_grad_(False)
    vae.enable_tiling(options.tile, options.tile, options.tile * 3 // 4, options.tile * 3 // 4)
    return vae


def pad_and_gather(vae: Any, half: str, x: torch.Tensor) -> Any:
    """Tiles in turn to the ranks, padded to the largest, gathered by all, blended on rank 0 by the VAE's own loops."""
    sample_ratio = vae.spatial_compression_ratio
    size, stride = vae.tile_sample_min_height, vae.tile_sample_stride_height
    cut = (size, stride) if half == "encode" else (size // sample_ratio, stride // sample_ratio)
    made = (size, stride) if half == "decode" else (size // sample_ratio, stride // sample_ratio)
    starts = [(i, j) for i in range(0, x.shape[-2], cut[1]) for j in range(0, x.shape[-1], cut[1])]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    run = _encode_tile if half == "encode" else _decode_tile
    mine = [run(vae, x[..., i : i + cut[0], j : j + cut[0]]) for i, j in starts[rank::ranks]]
    shape = [*mine[0].shape[:-2], made[0], made[0]]
    padded = torch.zeros([-(-len(starts) // ranks), *shape], dtype=x.dtype, device=x.device)
    for slot, tile in zip(padded, mine, strict=False):
        slot[..., : tile.shape[-2], : tile.shape[-1]] = tile
    gathered = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(gathered, padded)
    if rank:
        return None
    scale = made[0] / cut[0]
    tiles: list[torch.Tensor] = []
    for number, (i, j) in enumerate(starts):
        height, width = (int(min(cut[0], n - at) * scale) for n, at in ((x.shape[-2], i), (x.shape[-1], j)))
        tiles.append(gathered[number % ranks][number // ranks][..., :height, :width].clone())
    return _blended(vae, tiles, len(range(0, x.shape[-1], cut[1])), made, half)


def _encode_tile(vae: Any, tile: torch.Tensor) -> torch.Tensor:
    vae.clear_cache()
    parts: list[torch.Tensor] = []
    for k in range(1 + (tile.shape[2] - 1) // 4):
        vae._enc_conv_idx = [0]
        frames = tile[:, :, :1] if k == 0 else tile[:, :, 4 * k - 3 : 4 * k + 1]
        part = vae.encoder(frames, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx)
        parts.append(vae.quant_conv(part))
    return torch.cat(parts, 2)


def _decode_tile(vae: Any, tile: torch.Tensor) -> torch.Tensor:
    vae.clear_cache()
    parts: list[torch.Tensor] = []
    for k in range(tile.shape[2]):
        vae._conv_idx = [0]
        latent = vae.post_quant_conv(tile[:, :, k : k + 1])
        parts.append(vae.decoder(latent, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=k == 0))
    return torch.cat(parts, 2)


def _blended(vae: Any, tiles: list[torch.Tensor], across: int, made: tuple[int, int], half: str) -> torch.Tensor:
    grid = [tiles[i : i + across] for i in range(0, len(tiles), across)]
    overlap, rows = made[0] - made[1], []
    for i, row in enumerate(grid):
        line: list[torch.Tensor] = []
        for j, tile in enumerate(row):
            tile = vae.blend_v(grid[i - 1][j], tile, overlap) if i else tile
            tile = vae.blend_h(row[j - 1], tile, overlap) if j else tile
            line.append(tile[..., : made[1], : made[1]])
        rows.append(torch.cat(line, -1))
    whole = torch.cat(rows, -2)
    return whole if half == "encode" else whole.clamp(-1, 1)


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until the slowest rank is done."""
    dist.barrier()
    started = time.perf_counter()
    result = work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    seconds = torch.tensor(time.perf_counter() - started)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item(), result


def _tensor(output: Any) -> torch.Tensor:
    value = output if torch.is_tensor(output) else output[0]
    return value if torch.is_tensor(value) else value.parameters


def measure(half: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of all ways; a row for each, on rank 0 alone."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    vae, other = build(options), build(options)
    shape = (1, 3, options.frames, options.height, options.width)
    if half == "decode":
        shape = (1, 16, 1 + (options.frames - 1) // 4, options.height // 8, options.width // 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(options.device, getattr(torch, options.dtype))
    runner = TileRunner(comm.connect(), Target(vae), ranks=ranks, gather="first")
    own = getattr(vae, half)
    exact = halovae.parallelize(other, gather="first", verify=False)
    ways: dict[str, Callable[[], Any]] = {
        "diffusers, 1 rank": lambda: own(x) if rank == 0 else None,
        "independent, N ranks": lambda: own(x),
        "pad and gather, N ranks": lambda: pad_and_gather(vae, half, x),
        "halovae tile, N ranks": lambda: runner.run(half, (x,), {}).result,
        "halovae exact, N ranks": lambda: getattr(other, half)(x),
    }
    with torch.no_grad():
        found = {name: timed(work, x.device)[1] for name, work in ways.items()}  # also warms up
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, work in ways.items():
                seconds[name].append(timed(work, x.device)[0])
        plan = runner.run(half, (x,), {}).plan
    exact.restore()
    return [] if rank else rows_of(half, shape, seconds, found, plan)


def rows_of(
    half: str, shape: tuple[int, ...], seconds: dict[str, list[float]], found: dict[str, Any], plan: Any
) -> list[dict[str, Any]]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    one, ranks = medians["diffusers, 1 rank"], dist.get_world_size()
    expected = _tensor(found["diffusers, 1 rank"])
    schedule = plan.schedule
    print(f"{half} of {shape}: {len(schedule.chains)} {plan.tiles}, spread {schedule.spread:.3f}", flush=True)
    rows: list[dict[str, Any]] = []
    for name, median in medians.items():
        independent = name.startswith("independent")  # what the machine allows: N results in that time
        distance = (_tensor(found[name]) - expected).abs().max().item()
        row = {"half": half, "way": name, "seconds": median, "least": min(seconds[name]), "most": max(seconds[name])}
        row |= {"speed-up": (ranks if independent else 1) * one / median, "difference": f"{distance:.1e}"}
        row["x tile"] = "-" if independent else medians["halovae tile, N ranks"] / median
        rows.append(row)
    return rows


def main(rank: int, options: argparse.Namespace) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(options.ranks), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(options.port)
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    comm.init_from_env(options.device)
    logging.disable(logging.WARNING)  # diffusers warns of .to(dtype) for an empty list of modules
    load = os.getloadavg()[0]
    rows = [row for half in ("encode", "decode") for row in measure(half, options)]
    if rank == 0:
        title = f"tiles on {options.ranks} ranks ({options.device}, {options.threads} threads each, "
        title += f"{dist.get_backend()}), base_dim {options.base_dim}, {options.dtype}, "
        title += f"median of {options.repeats}, load {load:.1f} at the start"
        report(title, rows, options.json)
    comm.shutdown()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"ranks": 2, "threads": 1, "repeats": 5, "base-dim": 16, "frames": 9, "height": 256,
                        "width": 256, "tile": 128}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        options.port = probe.getsockname()[1]
    return options


if __name__ == "__main__":
    arguments = parsed()
    mp.spawn(main, (arguments,), nprocs=arguments.ranks)
