"""Every VAE on one GPU at its real size: diffusers, diffusers compiled, and halovae as it is, in one run.

    python benchmarks/gpu_vaes.py --compiled --json benchmarks/results/gpu-vaes.json
    python benchmarks/gpu_vaes.py --fresh --json benchmarks/results/gpu-vaes-fresh.json

The classes' real configurations, random weights, bfloat16, whole pictures (no tiles). Each VAE has a process of its own
with a time limit; what did not end in it is a row "not run". Times are medians of interleaved rounds by events of the
device. Memory is the most that was allocated during a call beyond the weights. "compiled" is diffusers with weights
channels last and `torch.compile` of the network, its warm-up beside it. Errors are relative distances to the same VAE
in float32. "halovae" is without any option, from the third call on; "not replayed" is with `graphs=False`. "first" is
the first call of a fresh VAE; whether kernels are in the cache on disk is as it is.

With `--ahead 6`, all rows are run once before, six at a time: so compilers work side by side, and the measured pass
finds their results on disk. Of the first pass, only the warm-up of `torch.compile` is told.

With `--fresh`, what a command line does: one encode and one decode in a process of its own, from the VAE on the device
to the frames, by diffusers, by halovae with an empty cache of kernels on disk, and with a filled one.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import torch
from harness import report
from torch import Tensor

import halovae

FOUR_DOWN = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
KL = {**FOUR_DOWN, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024}
COGVIDEOX = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (128, 256, 256, 512), "layers_per_block": 3, "latent_channels": 16,
}  # fmt: skip
HUNYUAN_IMAGE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 64, "block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "layers_per_block": 2, "spatial_compression_ratio": 32, "sample_size": 384,
}  # fmt: skip
LINEAR_ATTENTION = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
DC = {
    "encoder_block_types": LINEAR_ATTENTION, "decoder_block_types": LINEAR_ATTENTION,
    "upsample_block_type": "interpolate", "downsample_block_type": "conv",
}  # fmt: skip
SVD = {
    "down_block_types": FOUR_DOWN["down_block_types"], "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "sample_size": 768,
}  # fmt: skip
WAN_2_2 = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12,
    "out_channels": 12, "scale_factor_spatial": 16,
}  # fmt: skip

Shape = tuple[int, ...]
VAES: dict[str, tuple[str, dict[str, Any], Shape, Shape]] = {
    "SDXL 1024x1024": ("AutoencoderKL", KL | {"latent_channels": 4}, (4, 128, 128), (3, 1024, 1024)),
    "FLUX.1 2048x2048": ("AutoencoderKL", KL | {"latent_channels": 16}, (16, 256, 256), (3, 2048, 2048)),
    "FLUX.2 1024x1024": ("AutoencoderKLFlux2", {}, (32, 128, 128), (3, 1024, 1024)),
    "FLUX.2 2048x2048": ("AutoencoderKLFlux2", {}, (32, 256, 256), (3, 2048, 2048)),
    "QwenImage 1328x1328": ("AutoencoderKLQwenImage", {}, (16, 1, 166, 166), (3, 1, 1328, 1328)),
    "HunyuanImage 2048x2048": ("AutoencoderKLHunyuanImage", HUNYUAN_IMAGE, (64, 64, 64), (3, 2048, 2048)),
    "LTX 512x768x121": ("AutoencoderKLLTXVideo", {}, (128, 16, 16, 24), (3, 121, 512, 768)),
    "LTX-2 512x768x121": ("AutoencoderKLLTX2Video", {}, (128, 16, 16, 24), (3, 121, 512, 768)),
    "CogVideoX 480x720x49": ("AutoencoderKLCogVideoX", COGVIDEOX, (16, 13, 60, 90), (3, 49, 480, 720)),
    "HunyuanVideo 480x832x33": ("AutoencoderKLHunyuanVideo", {}, (16, 9, 60, 104), (3, 33, 480, 832)),
    "HunyuanVideo15 480x832x33": ("AutoencoderKLHunyuanVideo15", {}, (32, 9, 30, 52), (3, 33, 480, 832)),
    "Mochi 480x848x31": ("AutoencoderKLMochi", {}, (12, 6, 60, 106), (3, 31, 480, 848)),
    "KVAE 1024x1024": ("AutoencoderKLKVAE", {}, (16, 128, 128), (3, 1024, 1024)),
    "AutoencoderDC 1024x1024": ("AutoencoderDC", DC, (32, 32, 32), (3, 1024, 1024)),
    "HunyuanImage refiner 1024x1024": ("AutoencoderKLHunyuanImageRefiner", {}, (32, 1, 64, 64), (3, 1, 1024, 1024)),
    "TemporalDecoder 576x1024x14": ("AutoencoderKLTemporalDecoder", SVD, (4, 72, 128), (3, 576, 1024)),
    "KVAEVideo 480x832x17": ("AutoencoderKLKVAEVideo", {}, (16, 5, 60, 104), (3, 17, 480, 832)),
    "Magvit 384x672x49": ("AutoencoderKLMagvit", {}, (16, 13, 48, 84), (3, 49, 384, 672)),
    "VidTok 256x256x17": ("AutoencoderVidTok", {}, (4, 5, 32, 32), (3, 17, 256, 256)),
    "Cosmos 480x832x33": ("AutoencoderKLCosmos", {}, (16, 5, 60, 104), (3, 33, 480, 832)),
    "Wan 2.1 480x832x81": ("AutoencoderKLWan", {}, (16, 21, 60, 104), (3, 81, 480, 832)),
    "Wan 2.2 704x1280x81": ("AutoencoderKLWan", WAN_2_2, (48, 21, 44, 80), (3, 81, 704, 1280)),
}
"""Class, configuration, latent and sample without the batch."""
LARGE: dict[str, tuple[str, dict[str, Any], Shape, Shape]] = {
    "Wan 2.1 720x1280x81": ("AutoencoderKLWan", {}, (16, 21, 90, 160), (3, 81, 720, 1280)),
    "Wan 2.2 704x1280x121": ("AutoencoderKLWan", WAN_2_2, (48, 31, 44, 80), (3, 121, 704, 1280)),
    "HunyuanVideo 720x1280x129": ("AutoencoderKLHunyuanVideo", {}, (16, 33, 90, 160), (3, 129, 720, 1280)),
    "HunyuanVideo15 480x832x81": ("AutoencoderKLHunyuanVideo15", {}, (32, 21, 30, 52), (3, 81, 480, 832)),
    "HunyuanVideo15 720x1280x121": ("AutoencoderKLHunyuanVideo15", {}, (32, 31, 45, 80), (3, 121, 720, 1280)),
}
"""What is for several GPUs: `full_size.py`, and `gpu.py --parts several`."""
ALL = VAES | LARGE

LATENT_BATCH = {"TemporalDecoder 576x1024x14": 14}
"""Where frames are a batch."""

HALVES = ("encode", "decode")
DEVICE = str(torch.accelerator.current_accelerator() or "cpu")


def shrink() -> None:
    """Make all VAEs and pictures tiny, to try a benchmark out on a CPU."""
    for name, (kind, config, latent, sample) in ALL.items():
        narrow = {"base_dim": 8} if kind == "AutoencoderKLWan" else {"block_out_channels": (32,) * 4}
        if kind == "AutoencoderKLHunyuanVideo15":
            narrow = {"block_out_channels": (64,) * 5}
        if "decoder_base_dim" in config:
            narrow["decoder_base_dim"] = 12
        frames, small = (3,) if len(latent) == 4 else (), [8, 12]
        ratios = [many // few for many, few in zip(sample[-2:], latent[-2:], strict=True)]
        period = (sample[1] - 1) // (latent[1] - 1) if frames and latent[1] > 1 else 1
        ALL[name] = (
            kind, config | narrow, (latent[0], *frames, *small),
            (sample[0], *((n - 1) * period + 1 for n in frames), *(n * r for n, r in zip(small, ratios, strict=True))),
        )  # fmt: skip


def build(name: str) -> Any:
    kind, config, *_ = ALL[name]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        vae = getattr(diffusers, kind)(**config)
    return vae.to(DEVICE, torch.bfloat16).eval().requires_grad_(False)


def channels_last(vae: Any) -> Any:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
    return vae


def picture(name: str, half: str) -> Tensor:
    shape = ALL[name][2 if half == "decode" else 3]
    batch = LATENT_BATCH.get(name, 1) if half == "decode" else 1
    generator = torch.Generator(DEVICE).manual_seed(1)
    return torch.randn((batch, *shape), generator=generator, device=DEVICE).clamp_(-1, 1).to(torch.bfloat16)


def call(vae: Any, half: str, tensor: Tensor) -> Tensor:
    if half == "decode":
        frames = {"num_frames": len(tensor)} if "num_frames" in inspect.signature(vae.decode).parameters else {}
        result = vae.decode(tensor, **frames)
        return getattr(result, "sample", result)
    result = vae.encode(tensor)
    return result.latent_dist.parameters if hasattr(result, "latent_dist") else result.latent


def seconds(run: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def first_seconds(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_gib(run: Callable[[], Any]) -> float:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def compiled(name: str, half: str) -> Any:
    vae = channels_last(build(name))
    network = "decoder" if half == "decode" else "encoder"
    setattr(vae, network, torch.compile(getattr(vae, network)))
    return vae


def measured(name: str, half: str, with_compiled: bool, repeats: int) -> dict[str, Any]:
    """One row: all variants of a half in turns; without rounds, only what torch.compile takes before."""
    tensor = picture(name, half)
    vaes = {way: build(name) for way in ("diffusers", "halovae", "not replayed")}
    halovae.optimize(vaes["not replayed"], options=halovae.Options(graphs=False))
    handle = halovae.optimize(vaes["halovae"])
    ways: dict[str, Callable[[], Any]] = {
        way: (lambda vae=vae: call(vae, half, tensor)) for way, vae in vaes.items()
    }  # fmt: skip
    firsts = {way: first_seconds(ways[way]) for way in ("diffusers", "halovae")}
    memory = {way: peak_gib(ways[way]) for way in ("diffusers", "not replayed")}
    results = {way: ways[way]().float() for way in ("diffusers", "halovae")}
    warm_up = None
    if with_compiled:
        plain = compiled(name, half)
        try:
            warm_up = first_seconds(lambda: call(plain, half, tensor))
            ways["compiled"] = lambda: call(plain, half, tensor)
        except (RuntimeError, AssertionError) as error:  # Of the compiler.
            warm_up = f"not run: {type(error).__name__}"
    for way in ways.values():
        for _ in range(3):  # The second call of a kind may be recorded, and the third is replayed.
            way()
    if not repeats:
        return {"warm-up s": warm_up}
    rounds = [{way: seconds(run) for way, run in ways.items()} for _ in range(repeats)]
    times = {way: statistics.median(each[way] for each in rounds) for way in ways}
    assert handle.last is not None
    kept = handle.last.kept_memory / 2**30
    truth = build(name).float()
    expected = call(truth, half, tensor.float())
    errors = {way: ((found - expected).norm() / expected.norm()).item() for way, found in results.items()}
    return {
        "VAE": name, "half": half, "diffusers s": times["diffusers"], "compiled s": times.get("compiled"),
        "warm-up s": warm_up, "halovae s": times["halovae"], "not replayed s": times["not replayed"],
        "over diffusers": times["diffusers"] / times["halovae"],
        "over the better": min(times["diffusers"], times.get("compiled", float("inf"))) / times["halovae"],
        "first s": f"{firsts['diffusers']:.2f}, {firsts['halovae']:.2f}",
        "GiB": f"{memory['diffusers']:.2f}, {memory['not replayed']:.2f}",
        "kept GiB": kept if handle.last.replayed else "-",
        "error": f"{errors['diffusers']:.1e}, {errors['halovae']:.1e}",
    }  # fmt: skip


def warm_ups(rows: list[tuple[str, str]], options: argparse.Namespace) -> dict[tuple[str, str], float | None]:
    """Seconds that torch.compile takes for each row, several at a time; compilers leave their results on disk."""
    once = argparse.Namespace(**vars(options) | {"repeats": 0})
    with ThreadPoolExecutor(options.ahead) as pool:
        return {
            row: found.get("warm-up s")
            for row, found in zip(rows, pool.map(lambda row: in_own_process(*row, once), rows), strict=True)
        }  # fmt: skip


def in_own_process(name: str, half: str, options: argparse.Namespace) -> dict[str, Any]:
    arguments = ["--one", name, half, "--repeats", str(options.repeats), *(["--compiled"] if options.compiled else [])]
    row: dict[str, Any] = {"VAE": name, "half": half}
    try:
        done = subprocess.run(
            [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, timeout=options.limit
        )  # fmt: skip
        return json.loads(done.stdout) if done.returncode == 0 else row | {"not run": f"exit code {done.returncode}"}
    except subprocess.TimeoutExpired:
        return row | {"not run": f"no result after {options.limit:.0f} s"}


def fresh(name: str, way: str) -> float:
    """Seconds of one encode and one decode, from a VAE that is on the device."""
    vae, tensors = build(name), {half: picture(name, half) for half in HALVES}

    def both() -> None:
        if way == "halovae":
            halovae.optimize(vae)
        for half in HALVES:
            call(vae, half, tensors[half])

    return first_seconds(both)


def fresh_row(name: str, limit: float) -> dict[str, Any]:
    row: dict[str, Any] = {"VAE": name, "half": "both"}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TRITON_CACHE_DIR": folder}
        for title, way in (("diffusers s", "diffusers"), ("empty cache s", "halovae"), ("filled cache s", "halovae")):
            command = [sys.executable, __file__, "--fresh-one", name, way]
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, env=environment)
            except subprocess.TimeoutExpired:
                return row | {"not run": f"no result after {limit:.0f} s"}
            if done.returncode:
                return row | {"not run": f"exit code {done.returncode}"}
            row[title] = float(done.stdout)
    return row | {"filled over diffusers": row["filled cache s"] / row["diffusers s"]}


@torch.no_grad()  # torch.compile fails in inference mode on flags that numpy has made.
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vaes", nargs="*", default=list(VAES), help="names, or parts of names")
    parser.add_argument("--halves", nargs="*", default=HALVES, choices=HALVES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="measure torch.compile as well")
    parser.add_argument("--limit", type=float, default=120, help="seconds for each VAE and half")
    parser.add_argument("--ahead", type=int, default=0, help="run all rows once before, so many at a time")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "HALF"), help="one row, as JSON")
    parser.add_argument("--fresh", action="store_true", help="one encode and one decode, each way in its own process")
    parser.add_argument("--fresh-one", nargs=2, metavar=("NAME", "WAY"), help="seconds of one of them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if options.one:
        print(json.dumps(measured(*options.one, options.compiled, options.repeats)))
        return
    if options.fresh_one:
        print(fresh(*options.fresh_one))
        return
    names = [name for name in VAES if any(part in name for part in options.vaes)]
    todo = [(name, half) for name in names for half in (("both",) if options.fresh else options.halves)]
    ahead = warm_ups(todo, options) if options.ahead else {}
    rows: list[dict[str, Any]] = []
    for name, half in todo:
        rows.append(fresh_row(name, options.limit) if options.fresh else in_own_process(name, half, options))
        if ahead.get((name, half)) and "warm-up s" in rows[-1]:
            rows[-1]["warm-up s"] = ahead[name, half]
        print(rows[-1], file=sys.stderr, flush=True)
        if options.json:  # What is there by now, should the rest not be reached.
            options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = max(rows, key=len)
    rows = [{column: row.get(column, row.get("not run", "not run")) for column in columns} for row in rows]
    report(f"one {torch.cuda.get_device_name()}", rows, options.json)


if __name__ == "__main__":
    main()
