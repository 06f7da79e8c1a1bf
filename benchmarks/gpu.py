"""One GPU: diffusers against halovae in one run, and what N GPUs would take.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json

Wan 2.1 and 2.2 architectures with random weights in bfloat16. Times are medians of interleaved rounds by events of
the device, memory is the most that was allocated during a call beyond the weights. The error of both is measured
against the same VAE in float32, at a smaller size.

The time of N GPUs is a projection, not a measurement: the shard of the first, a middle and the last rank runs alone
on this GPU, with its halos left blank, and the slowest of them counts; to it is added the time of its messages on a
link of the stated speed, as if nothing of it were hidden.

Where the host has several GPUs, 1, 2, 4 and 8 of them run exact mode for real (`--parts several`), without any option:
"s" is the least of the calls from the fourth on, each until its slowest GPU ends, "efficiency" is of our own one GPU,
"exposed s" is what is left of it beside the slowest shard alone, and "projected s" what the projection says. A VAE has
processes of its own and a time limit; its rows are printed as they come. `--tiny 2` tries this part out on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_vaes
import torch
from diffusers import AutoencoderKLWan
from exact import distvae
from harness import limited, rank_of, report, run_ranks, tell
from torch import Tensor
from torch import distributed as dist

import halovae
from halovae.base.memory import PeakMemory
from halovae.calls.device_graphs import Outlet
from halovae.calls.merge_steps import Merger, merged
from halovae.calls.replay import Graphs
from halovae.calls.target import Target
from halovae.comm import SoloComm, Traffic
from halovae.exact.mesh import ShardPlan, plan_shards
from halovae.exact.run import GroupRun, Runner, on_shards

WAN_2_2 = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12,
    "out_channels": 12, "scale_factor_spatial": 16,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {"Wan 2.1": ({}, 16, 8), "Wan 2.2": (WAN_2_2, 48, 16)}
"""Configuration, latent channels, spatial ratio."""
CASES = [("Wan 2.1", (480, 832, 81)), ("Wan 2.1", (720, 1280, 81)), ("Wan 2.2", (480, 832, 81))]
SEVERAL = (
    "Wan 2.1 480x832x81", "Wan 2.1 720x1280x81", "Wan 2.2 704x1280x121", "FLUX.2 2048x2048",
    "HunyuanVideo15 480x832x81", "SDXL 1024x1024", "FLUX.2 1024x1024",
)  # fmt: skip
"""Of `gpu_vaes.py`, for all GPUs of the host."""
PARTS = ("one", "projection", "several", "processes")
LINK_BYTES_PER_SECOND = 300e9
LINK_SECONDS_PER_MESSAGE = 20e-6


class LonelyComm(SoloComm):
    """A rank of many whose neighbours never answer: it counts what it would send, and receives zeros."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Any:
        self.traffic.messages += len(sends)
        self.traffic.bytes += sum(tensor.nbytes for _, tensor in sends)
        for _, buffer in receives:
            buffer.zero_()
        return super().post([], [])


def build(model: str, dtype: torch.dtype = torch.bfloat16) -> AutoencoderKLWan:
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # diffusers warns of .to(dtype) for an empty list of modules
    return AutoencoderKLWan(**MODELS[model][0]).to("cuda", dtype).eval().requires_grad_(False)


def picture(model: str, size: tuple[int, int, int], half: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    height, width, frames = size
    _, channels, ratio = MODELS[model]
    shape = (3, frames, height, width) if half == "encode" else (
        channels, (frames - 1) // 4 + 1, height // ratio, width // ratio)  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randn((1, *shape), generator=generator, device="cuda").clamp_(-1, 1).to(dtype)


def call(vae: Any, half: str, tensor: Tensor) -> Tensor:
    return vae.encode(tensor).latent_dist.parameters if half == "encode" else vae.decode(tensor).sample


def seconds(run: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        return elapsed(run)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    for variant in variants.values():
        for _ in range(2):  # The second call of a kind may be recorded.
            variant()
    rounds = [{name: seconds(variant) for name, variant in variants.items()} for _ in range(repeats)]
    return {name: statistics.median(each[name] for each in rounds) for name in variants}


def peak_gib(run: Callable[[], Any]) -> float:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def errors(model: str, half: str) -> tuple[float, float]:
    """Relative distance of diffusers and of halovae in bfloat16 to diffusers in float32."""
    size = (256, 256, 17)
    truth = call(build(model, torch.float32), half, picture(model, size, half).float())
    plain = call(build(model), half, picture(model, size, half))
    vae = build(model)
    with halovae.parallelize(vae):
        ours = call(vae, half, picture(model, size, half))
    return tuple(((found.float() - truth).norm() / truth.norm()).item() for found in (plain, ours))  # type: ignore


def row(model: str, size: tuple[int, int, int], half: str, repeats: int) -> dict[str, Any]:
    vaes, tensor = {name: build(model) for name in ("diffusers", "halovae", "replayed")}, picture(model, size, half)
    handles = [
        halovae.parallelize(vaes["halovae"], options=halovae.Options(graphs=False)),
        halovae.parallelize(vaes["replayed"], options=halovae.Options(graphs=True)),
    ]
    variants = {name: partial(call, vae, half, tensor) for name, vae in vaes.items()}
    times = interleaved(variants, repeats)
    memory = {name: peak_gib(variants[name]) for name in ("diffusers", "halovae")}
    replay = handles[1].last
    assert replay is not None
    for handle in handles:
        handle.restore()
    error, our_error = errors(model, half)
    return {
        "case": f"{model} {'x'.join(map(str, size))}",
        "half": half,
        "diffusers s": times["diffusers"],
        "halovae s": times["halovae"],
        "replayed s": times["replayed"] if replay.replayed else None,
        "speed-up": times["diffusers"] / times["halovae"],
        "diffusers GiB": memory["diffusers"],
        "halovae GiB": memory["halovae"],
        "diffusers error": f"{error:.1e}",
        "halovae error": f"{our_error:.1e}",
    }


def shard_seconds(comm: LonelyComm, plan: ShardPlan, network: tuple[Any, ...], runner: Runner, repeats: int) -> float:
    """One rank's part without putting the parts together."""
    call, *given = network

    def run() -> None:
        work = GroupRun(comm, plan, *given, "shard")
        work.run(call, runner)
        work.gather()

    for _ in range(3):  # The second is recorded, and sends nothing more than the first.
        comm.traffic = Traffic()
        run()
    sent, comm.traffic = comm.traffic, Traffic()
    found = statistics.median(seconds(run) for _ in range(repeats))
    comm.traffic = sent
    return found


def projection(model: str, size: tuple[int, int, int], half: str, ranks: int, repeats: int) -> dict[str, Any]:
    """The slowest shard alone, and its messages."""
    tensor, target = picture(model, size, half), Target(build(model))
    ratio = MODELS[model][2] if half == "encode" else 1
    plan = plan_shards(*tensor.shape[-2:], ratio, ranks, "auto")
    steps = Merger(SoloComm(), target, "auto").steps(half, plan, lambda: ratio, (tensor,), {})
    shards: list[tuple[float, float, int, int]] = []
    for rank in sorted({0, ranks // 2, ranks - 1}):
        comm = LonelyComm(rank, ranks)
        network = (merged(target, half, steps), (tensor,), {})
        times = [
            shard_seconds(comm, plan, network, runner, repeats)
            for runner in (on_shards, partial(Graphs(comm, target).run, half, str, Outlet()))
        ]
        shards.append((*times, comm.traffic.messages, comm.traffic.bytes))
    slowest, replayed = (max(shard[i] for shard in shards) for i in range(2))
    _, _, messages, sent_bytes = max(shards)
    link = sent_bytes / LINK_BYTES_PER_SECOND + messages * LINK_SECONDS_PER_MESSAGE
    return {
        "case": f"{model} {'x'.join(map(str, size))}", "half": half, "GPUs": ranks,
        "grid": "x".join(map(str, plan.shape)), "calls": len(steps), "slowest shard s": slowest,
        "messages": messages, "MiB sent": sent_bytes / 2**20, "link s": link,
        "projected s": slowest + link, "replayed s": replayed, "projected replayed s": replayed + link,
    }  # fmt: skip


def on_several(name: str, repeats: int, device: torch.device) -> None:
    """Rows of one VAE of `gpu_vaes.py`: one device, and more and more of those that there are."""
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = {count: dist.new_group(range(count)) for count in (1, 2, 4, 8) if count <= world}
    counts = [1, *sorted(set(groups) - {1}, reverse=True)]
    jobs: list[tuple[str, int, Any]] = [(half, count, "auto") for half in gpu_vaes.HALVES for count in counts]
    grids = ("height", "width", *([(2, world // 2)] if world > 3 else []))
    jobs += [(half, counts[1], axis) for half in gpu_vaes.HALVES for axis in grids if world > 1]
    seen: dict[tuple[str, int, Any], float] = {}
    for half, count, axis in jobs:
        shape = plan_of(name, half, count, axis).shape
        if rank >= count or (half, count, shape) in seen:
            continue
        found = spread_out(name, half, groups[count], axis, repeats, device)
        best, alone = min(found["calls"][3:]), found["alone"]
        seen[half, count, shape] = best
        one = seen.get((half, 1, (1, 1)), 0.0)
        link = found["bytes"] / LINK_BYTES_PER_SECOND + found["messages"] * LINK_SECONDS_PER_MESSAGE
        tell({
            "case": name, "half": half, "GPUs": count, "grid": "x".join(map(str, shape)), "s": best,
            "speed-up": one / best, "efficiency": one / best / count, "first s": found["calls"][0],
            "messages": found["messages"], "MiB sent": found["bytes"] / 2**20, "shard alone s": alone or "-",
            "exposed s": best - alone if alone else "-", "projected s": alone + link if alone else "-",
            "GiB": found["memory"] / 2**30, "replayed": found["replayed"],
            "calls s": " ".join(f"{each:.3f}" for each in found["calls"]),
        })  # fmt: skip
    for half in gpu_vaes.HALVES if world > 1 and "Wan" in name else ():
        peer = distvae_seconds(name, half, repeats)
        if peer:
            tell({"case": name, "half": half, "GPUs": world, "grid": "DistVAE", "s": peer})


def plan_of(name: str, half: str, ranks: int, axis: Any) -> ShardPlan:
    """Which rank has which part of the picture."""
    _, _, latent, sample = gpu_vaes.ALL[name]
    ratio = sample[-1] // latent[-1]
    return plan_shards(*(sample if half == "encode" else latent)[-2:], ratio if half == "encode" else 1, ranks, axis)


def spread_out(
    name: str, half: str, group: dist.ProcessGroup, axis: Any, repeats: int, device: torch.device
) -> dict[str, Any]:
    """The first calls on the ranks of a group, each until its slowest rank ends, and what they sent and took."""
    vae, tensor, ranks = gpu_vaes.build(name), gpu_vaes.picture(name, half), dist.get_world_size(group)
    dist.barrier(group)  # Some were idle before.
    handle = halovae.optimize(vae) if ranks == 1 else halovae.parallelize(vae, group, axis=axis)
    own, peaks = list[float](), list[int]()
    for _ in range(3 + repeats):  # The second is recorded where that pays.
        memory = PeakMemory(device)
        dist.barrier(group)
        own.append(elapsed(lambda: gpu_vaes.call(vae, half, tensor)))
        peaks.append(memory.growth)
    report = handle.last
    assert report is not None
    mine = {"calls": own, "memory": peaks[0], "messages": report.messages, "bytes": report.bytes}
    handle.restore()
    mine["alone"] = shard_alone(name, half, tensor, ranks, repeats) if axis == "auto" and ranks > 1 else 0.0
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, mine, group)
    most = {key: max(each[key] for each in every) for key in mine if key != "calls"}
    calls = [max(turn) for turn in zip(*(each["calls"] for each in every), strict=True)]
    return {**most, "calls": calls, "replayed": report.replayed}


def shard_alone(name: str, half: str, tensor: Tensor, ranks: int, repeats: int) -> float:
    """Seconds of this rank's shard if its neighbours took no time, replayed where there are graphs."""
    target, plan = Target(gpu_vaes.build(name)), plan_of(name, half, ranks, "auto")
    _, _, latent, sample = gpu_vaes.ALL[name]
    ratio = sample[-1] // latent[-1] if half == "encode" else 1
    comm = LonelyComm(dist.get_rank(), ranks)
    steps = Merger(SoloComm(), target, "auto").steps(half, plan, lambda: ratio, (tensor,), {})
    runner = on_shards if gpu_vaes.DEVICE == "cpu" else partial(Graphs(comm, target).run, half, str, Outlet())
    return shard_seconds(comm, plan, (merged(target, half, steps), (tensor,), {}), runner, repeats)


def distvae_seconds(name: str, half: str, repeats: int) -> float | None:
    """Of the peer on all ranks, by the best of some calls; None where it is not installed or can't do this."""
    try:
        vae = distvae(gpu_vaes.build(name))
        if vae is None:
            return None
        tensor, own = gpu_vaes.picture(name, half), list[float]()
        for _ in range(2 + repeats):
            dist.barrier()
            own.append(elapsed(lambda: gpu_vaes.call(vae, half, tensor)))
    except Exception as error:
        print(f"DistVAE, {name}, {half}: {error!r:.300}", file=sys.stderr, flush=True)
        return None
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return min(max(turn) for turn in zip(*every, strict=True))


def elapsed(run: Callable[[], Any]) -> float:
    """Seconds of the host's clock, the device being at rest before and after."""
    wait = torch.accelerator.synchronize if gpu_vaes.DEVICE != "cpu" else lambda: None
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def several(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of `on_several`, each VAE on processes of its own for `--limit` seconds, all for `--budget`."""
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + options.budget
    ranks = options.tiny or torch.cuda.device_count()
    for name in [SEVERAL[index] for index in options.cases or range(len(SEVERAL))]:
        words = [
            __file__,
            "--child",
            name,
            "--repeats",
            str(options.repeats),
            *(["--tiny", str(options.tiny)] if options.tiny else []),
        ]
        told, reason = limited(words, ranks, max(1.0, min(options.limit, end - time.monotonic())))
        rows += told
        if reason:
            rows.append({"case": name, "GPUs": ranks, "not run": f"the rest: {reason}"})
            print(rows[-1], flush=True)
        if options.json:  # What is there by now, should the rest not be reached.
            options.json.with_stem(f"{options.json.stem}-several").write_text(json.dumps(rows, indent=1) + "\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [{column: row.get(column, "-") for column in columns} for row in rows]


def two_processes(rank: int) -> float:
    """Two ranks on one GPU in float64, their messages by way of the host: the largest relative difference."""
    size, worst = (64, 96, 9), 0.0
    for half in ("encode", "decode"):
        plain, ours = build("Wan 2.1", torch.float64), build("Wan 2.1", torch.float64)
        tensor = picture("Wan 2.1", size, half, torch.float64)
        halovae.parallelize(ours)
        expected, found = call(plain, half, tensor), call(ours, half, tensor)
        worst = max(worst, ((found - expected).abs().max() / expected.abs().max()).item())
    return worst


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--cases", type=int, nargs="*", help="which of the cases to run; of --parts several: of its own"
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8], help="numbers of GPUs to project to")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to measure")
    parser.add_argument("--limit", type=float, default=110, help="seconds for each VAE of --parts several")
    parser.add_argument("--budget", type=float, default=570, help="seconds for all of --parts several")
    parser.add_argument("--tiny", type=int, metavar="RANKS", help="--parts several, small, on ranks of a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        gpu_vaes.shrink()
    if options.child:
        logging.disable(logging.WARNING)
        with rank_of(gpu_vaes.DEVICE) as place:
            on_several(options.child, options.repeats, place)
        return
    device = "CPU" if options.tiny else torch.cuda.get_device_name()
    halves = ("encode", "decode")
    rows: list[dict[str, Any]] = []
    cases = [CASES[index] for index in options.cases or range(len(CASES))] if "one" in options.parts else []
    for model, size in cases:
        for half in halves:
            rows.append(row(model, size, half, options.repeats))
            print(rows[-1], file=sys.stderr, flush=True)
    if rows:
        report(f"one {device}", rows, options.json)
    ranks = options.ranks if "projection" in options.parts else []
    projected = [projection(*CASES[0], half, n, options.repeats) for half in halves for n in ranks]
    if projected:
        link = f"{LINK_BYTES_PER_SECOND / 1e9:.0f} GB/s, {LINK_SECONDS_PER_MESSAGE * 1e6:.0f} us a message"
        second = options.json and options.json.with_stem(f"{options.json.stem}-projection")
        print()
        report(f"projection from one {device}: {link}", projected, second)
    if "several" in options.parts and (options.tiny or torch.cuda.device_count() > 1):
        third = options.json and options.json.with_stem(f"{options.json.stem}-several")
        shared = several(options)
        print()
        report(f"{max(row['GPUs'] for row in shared)} of {device}", shared, third)
    sys.stdout.flush()
    if "processes" not in options.parts:
        return
    worst = max(run_ranks(2, two_processes))
    print(f"\ntwo processes on one GPU, float64: largest difference {worst:.1e} of the largest value")


if __name__ == "__main__":
    main()
