"""One GPU: diffusers against halovae in one run, and what N GPUs would take.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json

Wan 2.1 and 2.2 architectures with random weights in bfloat16. Times are medians of interleaved rounds by events of
the device, memory is the most that was allocated during a call beyond the weights. The error of both is measured
against the same VAE in float32, at a smaller size.

The time of N GPUs is a projection, not a measurement: the shard of the first, a middle and the last rank runs alone
on this GPU, with its halos left blank, and the slowest of them counts; to it is added the time of its messages on a
link of the stated speed, as if nothing of it were hidden. Where the host has several GPUs, all of them run exact mode
for real as well, next to one of them alone.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from harness import report, run_ranks
from torch import Tensor
from torch import distributed as dist

import halovae
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
            for runner in (on_shards, partial(Graphs(comm, target).run, half, ""))
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


def on_own_gpus(rank: int, model: str, size: tuple[int, int, int], half: str, repeats: int) -> dict[str, Any]:
    """Exact mode on all ranks and the first rank alone, in turns: medians of the slowest rank's seconds."""
    vaes = {name: build(model) for name in ("exact", "replayed", "one", "one replayed")}
    tensor = picture(model, size, half)
    handle = halovae.parallelize(vaes["exact"], options=halovae.Options(graphs=False))
    halovae.parallelize(vaes["replayed"], options=halovae.Options(graphs=True))
    halovae.optimize(vaes["one"], options=halovae.Options(graphs=False))
    halovae.optimize(vaes["one replayed"], options=halovae.Options(graphs=True))
    variants = {name: partial(call, vae, half, tensor) for name, vae in vaes.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 2):
        for name, variant in variants.items():
            dist.barrier()
            torch.cuda.synchronize()
            started = time.perf_counter()
            if name in ("exact", "replayed") or rank == 0:
                variant()
            torch.cuda.synchronize()
            if turn > 1:
                times[name].append(time.perf_counter() - started)
    assert handle.last is not None
    return {
        **{name: statistics.median(each) for name, each in times.items()}, "messages": handle.last.messages,
        "MiB": handle.last.bytes / 2**20, "wait": handle.last.wait_seconds, "calls": len(handle.last.steps),
    }  # fmt: skip


def several(model: str, size: tuple[int, int, int], half: str, repeats: int) -> dict[str, Any]:
    ranks = torch.cuda.device_count()
    found = run_ranks(ranks, on_own_gpus, model, size, half, repeats, device="cuda")
    exact, replayed = (max(each[name] for each in found) for name in ("exact", "replayed"))
    return {
        "case": f"{model} {'x'.join(map(str, size))}", "half": half, "GPUs": ranks, "one GPU s": found[0]["one"],
        "exact s": exact, "speed-up": found[0]["one"] / exact, "one GPU replayed s": found[0]["one replayed"],
        "replayed s": replayed, "speed-up replayed": found[0]["one replayed"] / replayed, "calls": found[0]["calls"],
        "messages": max(each["messages"] for each in found), "MiB sent": max(each["MiB"] for each in found),
        "exchanges s": max(each["wait"] for each in found),
    }  # fmt: skip


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
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="which of the cases to run")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8], help="numbers of GPUs to project to")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to measure")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.cuda.get_device_name()
    halves = ("encode", "decode")
    rows: list[dict[str, Any]] = []
    cases = [CASES[index] for index in options.cases]
    for model, size in cases if "one" in options.parts else []:
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
    if "several" in options.parts and torch.cuda.device_count() > 1:
        shared = [
            several(*case, half, options.repeats) for case in [CASES[i] for i in options.cases] for half in halves
        ]
        third = options.json and options.json.with_stem(f"{options.json.stem}-several")
        print()
        report(f"{torch.cuda.device_count()} of {device}", shared, third)
    sys.stdout.flush()
    if "processes" not in options.parts:
        return
    worst = max(run_ranks(2, two_processes))
    print(f"\ntwo processes on one GPU, float64: largest difference {worst:.1e} of the largest value")


if __name__ == "__main__":
    main()
