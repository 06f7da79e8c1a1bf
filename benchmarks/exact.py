"""Exact mode on N ranks against one rank un-parallel and against DistVAE, in one run.

    pip install --no-deps distvae==0.1.0
    python benchmarks/exact.py --ranks 1 2 4 8 --json benchmarks/results/exact.json

One thread per rank. `limit` is what the machine allows: every rank runs the un-parallel VAE on its own part of the
picture at the same time, with no communication; `fast limit` is the same with `halovae.optimize` on each rank, and
`fast s` is one rank with it: exact mode uses the same kernels. Times are medians of interleaved rounds, of the slowest
rank, and what compares two of them is the median of the rounds' own ratios; `cpu of fast limit` compares the processor
time of all ranks, to which waiting does not belong. Memory is the growth of the resident memory of a fresh process
during one call, on the rank where it grew most.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from harness import EAGER_FREE, interleaved, report, resident, run_ranks

import halovae
from halovae.base.memory import PeakMemory

CASES = [
    {"base_dim": 32, "dtype": "bfloat16", "size": (256, 256, 9)},
    {"base_dim": 32, "dtype": "float32", "size": (256, 256, 9)},
    {"base_dim": 96, "dtype": "bfloat16", "size": (256, 256, 9)},
    {"base_dim": 96, "dtype": "float32", "size": (256, 256, 9)},
]


def build(case: dict[str, Any]) -> AutoencoderKLWan:
    """A VAE of Wan 2.1's architecture with random weights, the same on every rank."""
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # diffusers warns of .to(dtype) for an empty list of modules
    vae = AutoencoderKLWan(base_dim=case["base_dim"]).to(getattr(torch, case["dtype"]))
    return vae.eval().requires_grad_(False)


def picture(case: dict[str, Any], half: str, parts: int = 1) -> torch.Tensor:
    """Input of one half, or of one of `parts` rows of it."""
    height, width, frames = case["size"]
    shape = (3, frames, height // parts, width) if half == "encode" else (
        16, (frames - 1) // 4 + 1, height // 8 // parts, width // 8)  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    return torch.randn((1, *shape), generator=generator).to(getattr(torch, case["dtype"]))


def call(vae: Any, half: str, tensor: torch.Tensor) -> torch.Tensor:
    return vae.encode(tensor).latent_dist.parameters if half == "encode" else vae.decode(tensor).sample


def distvae(vae: Any) -> Any:
    """The peer's VAE, or None where it is not installed."""
    try:
        from distvae.vae.parallel import parallelize_decoder, parallelize_encoder
    except ImportError:
        return None
    parallelize_encoder(vae, dist.group.WORLD)
    parallelize_decoder(vae, dist.group.WORLD)
    return vae


def measure_time(rank: int, case: dict[str, Any], half: str, repeats: int) -> dict[str, Any]:
    ranks = dist.get_world_size()
    plain, ours, peer = build(case), build(case), distvae(build(case))
    handle = halovae.parallelize(ours, axis="height")
    fast = build(case)
    halovae.optimize(fast)
    whole, part = picture(case, half), picture(case, half, ranks)
    variants = {
        "one": lambda: call(plain, half, whole) if rank == 0 else None,
        "limit": lambda: call(plain, half, part),
        "fast": lambda: call(fast, half, whole) if rank == 0 else None,
        "fast limit": lambda: call(fast, half, part),
        "exact": lambda: call(ours, half, whole),  # after the one that it is compared with most closely
    }
    expected, found = call(plain, half, whole), call(ours, half, whole)
    result: dict[str, Any] = {"error": _distance(found, expected), "peer_error": None}
    if peer is not None:
        variants["peer"] = lambda: call(peer, half, whole)
        result["peer_error"] = _distance(call(peer, half, whole), expected)
    result["spent"] = interleaved(variants, repeats)
    assert handle.last is not None
    last = handle.last
    return result | {"messages": last.messages, "bytes": last.bytes, "wait": last.wait_seconds}


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(found.double() - expected.double()) / expected.double().norm()).item()


def measure_memory(rank: int, case: dict[str, Any], half: str, variant: str) -> int:
    vae: Any = build(case)
    if variant == "exact":
        halovae.parallelize(vae, axis="height", verify=False)
    elif variant == "peer":
        vae = distvae(vae)
    tensor = picture(case, half)
    small = tensor[..., : tensor.shape[-2] // 4, : tensor.shape[-1] // 4].contiguous()
    call(vae, half, small)  # libraries load and groups connect outside the measurement
    gc.collect()
    before = resident()
    memory = PeakMemory(torch.device("cpu"))
    if variant != "one" or rank == 0:
        call(vae, half, tensor)
    return (memory.read() or 0) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2])
    parser.add_argument("--repeats", type=int, default=5, help="0: memory alone")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="which of the cases to run")
    parser.add_argument("--halves", nargs="*", default=["encode", "decode"], choices=["encode", "decode"])
    parser.add_argument("--size", type=int, nargs=3, metavar=("HEIGHT", "WIDTH", "FRAMES"), help="default: each case's")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for index, half, ranks in itertools.product(options.cases, options.halves, options.ranks):
        case = CASES[index] | ({"size": tuple(options.size)} if options.size else {})
        if options.repeats:
            rows.append(row(case, half, ranks, options.repeats, options.memory))
        else:
            rows.append(memory_row(case, half, ranks))
        print(rows[-1], file=sys.stderr, flush=True)
    report("exact mode", rows, options.json)


def memory_of(case: dict[str, Any], half: str, ranks: int, variants: list[str]) -> dict[str, float]:
    """MiB by which each variant grows, on the rank where it grows most."""
    found = (run_ranks(ranks, measure_memory, case, half, name, env=EAGER_FREE) for name in variants)
    return {name: max(grown) / 2**20 for name, grown in zip(variants, found, strict=True)}


def memory_row(case: dict[str, Any], half: str, ranks: int) -> dict[str, Any]:
    memory = memory_of(case, half, ranks, ["one", "exact"])
    ratio = memory["exact"] / memory["one"]
    sizes = {f"{name} MiB": _rounded(memory, name) for name in memory}
    return {"case": _name(case), "half": half, "ranks": ranks, **sizes, "memory": ratio}


def _name(case: dict[str, Any]) -> str:
    return f"base_dim {case['base_dim']} {case['dtype']} {'x'.join(map(str, case['size']))}"


def row(case: dict[str, Any], half: str, ranks: int, repeats: int, with_memory: bool) -> dict[str, Any]:
    per_rank = run_ranks(ranks, measure_time, case, half, repeats)
    spent, first = per_rank[0]["spent"], per_rank[0]
    exact, has_peer = spent["exact"], "peer" in spent
    variants = ["one", "exact", *(["peer"] if has_peer else [])]
    memory = memory_of(case, half, ranks, variants) if with_memory else {}
    return {
        "case": _name(case),
        "half": half,
        "ranks": ranks,
        "one rank s": spent["one"].seconds,
        "exact s": exact.seconds,
        "DistVAE s": spent["peer"].seconds if has_peer else "-",
        "speed-up": spent["one"].over(exact),
        "limit": spent["one"].over(spent["limit"]),
        "of limit": spent["limit"].over(exact),
        "fast s": spent["fast"].seconds,
        "of fast limit": spent["fast limit"].over(exact),
        "cpu of fast limit": _processor_time(per_rank, "fast limit") / _processor_time(per_rank, "exact"),
        "x DistVAE": spent["peer"].over(exact) if has_peer else "-",
        "error": f"{first['error']:.0e}",
        "DistVAE error": f"{first['peer_error']:.0e}" if has_peer else "-",
        "messages": max(r["messages"] for r in per_rank),
        "wait s": max(r["wait"] for r in per_rank),
        "MiB sent": max(r["bytes"] for r in per_rank) / 2**20,
        "one MiB": _rounded(memory, "one"),
        "exact MiB": _rounded(memory, "exact"),
        "DistVAE MiB": _rounded(memory, "peer"),
        "memory": memory["exact"] / memory["one"] if memory else "-",
    }


def _processor_time(per_rank: list[dict[str, Any]], variant: str) -> float:
    return sum(result["spent"][variant].cpu for result in per_rank)


def _rounded(memory: dict[str, float], name: str) -> Any:
    return round(memory[name]) if name in memory else "-"


if __name__ == "__main__":
    main()
