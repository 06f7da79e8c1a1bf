"""Image-to-video at the size of Wan2.2-I2V-A14B on the GPUs of one host, and the VAEs that need several of them.

    python benchmarks/full_size.py --json benchmarks/results/full-size-h200x2.json
    python benchmarks/full_size.py --parts table --size 720 1280 81     # the same rows at another size
    python benchmarks/full_size.py --tiny                               # on 2 CPU ranks, to see that all parts run

The architectures have their published sizes and random weights in bfloat16, made on the device. The prompt's embeddings
are given, of the text encoder's size: there is no text encoder, and its seconds are 0. The pipeline is run by what
`halovae image-to-video` runs it by, with the sequence on all GPUs (Ulysses), guidance 4 and flow shift 12, and by
diffusers alone, with its own Ulysses. Each row has processes of its own: "fresh" is their first call, "warm" a later
one, the third where halovae runs the VAE. Seconds are those of the first GPU, memory is the most that was allocated on
each. Few steps are run (--steps); "20 steps s" is the total as if they had been twenty. Of parts that a command leaves
out, the kernels are not on disk: there "fresh" includes their compilation.

Each part has a limit, and all together have one (--budget). Rows are printed as they come; what was not run is said.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import age, limited, machine, rank_of, table, tell
from torch import distributed as dist

STEPS = 20
"""Of the run that the totals are told for."""
NOT_PARALLEL = {"vae_encode": False, "vae_decode": False}
WAYS: dict[str, dict[str, Any]] = {
    "VAE not parallel": NOT_PARALLEL,
    "decode and encode, nothing on disk": {},
    "decode and encode": {},
    "decode": {"vae_encode": False},
    "diffusers": {},
    "layerwise offload, decode and encode": {"layerwise_offload": True},
    "layerwise offload, VAE not parallel": NOT_PARALLEL | {"layerwise_offload": True},
    "ring, decode and encode": {"attention_backend": "_native_cudnn"},
    "CPU offload, decode and encode": {"cpu_offload": True},
}
"""Rows of the pipeline, and the `Setup` of each. Kernels that one row has compiled are on disk for those after it."""
PARTS: dict[str, list[tuple[str, float]]] = {
    "table": [(way, 100.0) for way in list(WAYS)[:5]],
    "offload": [(way, 160.0) for way in list(WAYS)[5:7]],
    "vaes": [
        ("HunyuanVideo 720x1280x129", 150.0),
        ("HunyuanVideo15 720x1280x121", 100.0),
        ("Wan 2.2 704x1280x121", 75),
    ],
    "accuracy": [("accuracy", 180.0)],
    "once": [(way, 150.0) for way in list(WAYS)[7:]],
    "online": [("online", 240.0)],
}
"""Rows of each part, and the seconds after which each is ended."""
TRANSFORMER = {
    "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 36, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
}  # fmt: skip
TINY = {
    "num_attention_heads": 4, "attention_head_dim": 16, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2,
}  # fmt: skip
PICTURE = Path(__file__).parents[1] / "media" / "coffee.png"


def transformer(config: dict[str, Any], device: torch.device) -> Any:
    """In the formats that `from_pretrained` gives it in bfloat16."""
    from diffusers import WanTransformer3DModel

    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            made: Any = WanTransformer3DModel(**config)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in made.named_parameters():
        if set(name.split(".")) & set(made._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    return made.eval().requires_grad_(False)


def pipeline(options: argparse.Namespace, device: torch.device) -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline

    config = TRANSFORMER | (TINY if options.tiny else {}) | ({"num_layers": options.layers} if options.layers else {})
    torch.manual_seed(0)
    first, second = (transformer(config, device) for _ in range(2))
    with device:
        vae: Any = AutoencoderKLWan(**({"base_dim": 8} if options.tiny else {})).to(torch.bfloat16)
    vae.eval().requires_grad_(False)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=12.0, num_train_timesteps=1000
    )
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "scheduler": scheduler, "boundary_ratio": 0.9}
    made: Any = WanImageToVideoPipeline(vae=vae, transformer=first, transformer_2=second, **parts)
    texts = torch.randn(2, 1, 512, config["text_dim"], device=device, dtype=torch.bfloat16)
    made.encode_prompt = lambda *args, **kwargs: tuple(texts)
    return made


def wanted(options: argparse.Namespace, steps: int) -> Any:
    from PIL import Image

    from halovae import media
    from halovae.pipelines.generation_settings import Generation

    height, width, frames = options.size
    image = Image.fromarray(media.read(PICTURE, height=height, width=width).frames[0])
    return Generation(
        prompt="a cup of coffee", image=image, height=height, width=width, num_frames=frames, guidance_scale=4.0,
        num_inference_steps=steps, seed=0,
    )  # fmt: skip


class Peer:
    """diffusers' own pipeline with its own Ulysses, and with nothing of halovae but the clock of the stages."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        from diffusers import ContextParallelConfig

        from halovae.pipelines.transformers import some_device

        self.pipeline, self.device = pipeline.to(device), device
        with some_device():
            for part in (pipeline.transformer, pipeline.transformer_2):
                part.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))

    def run(self, generation: Any) -> Any:
        from halovae.pipelines.generation_settings import arguments
        from halovae.pipelines.stages import OTHER, StageTimeline, watched

        timeline = StageTimeline(self.device)
        with watched(self.pipeline, timeline, lambda done, total: None), timeline.stage(OTHER):
            chosen = arguments(type(self.pipeline), generation)
            self.pipeline(**chosen, generator=torch.Generator().manual_seed(0), output_type="np")
        return SimpleNamespace(seconds=timeline.seconds, peak_memory=timeline.peak_memory)


def setup_of(way: str) -> Any:
    from halovae.pipelines.generation_settings import Setup

    degree = "ring_degree" if way.startswith("ring") else "ulysses_degree"
    return Setup(**{degree: dist.get_world_size()}, flow_shift=12.0, **WAYS.get(way, NOT_PARALLEL))


def generate(way: str, options: argparse.Namespace, device: torch.device) -> None:
    """One row of the pipeline."""
    from halovae import comm
    from halovae.pipelines.runner import Runner
    from halovae.pipelines.stages import DENOISE, PROBE, VAE_DECODE, VAE_ENCODE

    pipe = pipeline(options, device)
    with ExitStack() as stack:
        if way == "diffusers":
            runner: Any = Peer(pipe, device)
        else:
            runner = stack.enter_context(Runner(pipe, setup_of(way), comm.world(), device))
        ready = age()
        calls = [("fresh", options.steps), ("second", 2), ("warm", options.steps)]
        if way.startswith("CPU"):  # Minutes each.
            calls = calls[:1]
        elif way == "diffusers" or "not parallel" in way:
            calls = calls[::2]
        for run, steps in calls:
            result = runner.run(wanted(options, steps))
            peaks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(peaks, result.peak_memory)
            if run == "second":
                continue
            seconds = result.seconds
            total = sum(seconds.values())
            named = {name: seconds.get(name, 0.0) for name in (VAE_ENCODE, DENOISE, VAE_DECODE, PROBE)}
            tell({
                "way": way, "call": run, "ready s": ready if run == "fresh" else "-",
                **{f"{name} s": value for name, value in named.items()}, "other s": total - sum(named.values()),
                "total s": total, f"{STEPS} steps s": total + named[DENOISE] * (STEPS / steps - 1),
                **{f"{name} GiB": most(peaks, name) for name in (VAE_ENCODE, DENOISE, VAE_DECODE)},
            })  # fmt: skip


def most(peaks: list[dict[str, int]], stage: str) -> str:
    """Of each rank."""
    return ", ".join(f"{peak.get(stage, 0) / 2**30:.2f}" for peak in peaks)


def accuracy(_: str, options: argparse.Namespace, device: torch.device) -> None:
    """How far the frames of a video are from those of the VAE that is not parallel, the denoising included."""
    import numpy as np

    from halovae import comm
    from halovae.evaluation import compare_clips
    from halovae.pipelines.parallel_vae import parallel_vae
    from halovae.pipelines.runner import Runner

    pipe, base, world = pipeline(options, device), setup_of(""), comm.world()
    one: dict[str, Any] = {}
    cases = [("exact", "un-tiled", "neither"), ("exact", "un-tiled", "both"), ("tile", "own tiles", "neither"),
             ("tile", "own tiles", "both"), ("exact", "un-tiled", "encode"), ("exact", "un-tiled", "decode"),
             ("exact", "un-tiled, VAE in float32", "neither")]  # fmt: skip
    with Runner(pipe, base, world, device) as runner:
        for mode, name, halves in cases:
            if "float32" in name:
                pipe.vae.float()
            chosen = {f"vae_{half}": halves in (half, "both") for half in ("encode", "decode")}
            with parallel_vae(pipe.vae, replace(base, vae_mode=mode, **chosen), world, runner.note):
                frames = runner.run(wanted(options, options.steps)).frames
            if frames is None:
                continue
            if halves == "neither":
                one[name] = frames
            against = "un-tiled" if halves == "neither" else name
            if against == name and halves == "neither":
                continue
            every = compare_clips(one[against][::4], frames[::4])
            gap = np.abs(one[against].astype(np.int16) - frames)
            tell({
                "frames": name, "parallel": halves, "against": f"{against}, not parallel",
                "worst SSIM of each 4th frame": f"{min(score.ssim for score in every.frames):.6f}",
                "PSNR": f"{every.psnr:.1f}", "largest": f"{gap.max()} of 255", "differ": f"{(gap > 0).mean():.1e}",
                "spread of levels": float(frames.std()),
            })  # fmt: skip


def whole_clip(name: str, options: argparse.Namespace, device: torch.device) -> None:
    """The un-tiled result on all ranks, and on the first diffusers' own tiles, and its un-tiled result."""
    import gpu_vaes

    import halovae
    from halovae.base.memory import PeakMemory, is_shortage

    if options.tiny:
        gpu_vaes.shrink()

    def called(vae: Any, half: str) -> tuple[float, float, Any]:
        """Seconds, GiB beyond what was allocated before, and the result."""
        tensor, peak = gpu_vaes.picture(name, half), PeakMemory(device)
        started = time.perf_counter()
        result = gpu_vaes.call(vae, half, tensor)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started, peak.growth / 2**30, result

    results: dict[str, Any] = {}
    for half in ("decode", "encode"):
        ours, calls, result = gpu_vaes.build(name), list[tuple[float, float]](), None
        way = f"un-tiled, {dist.get_world_size()} devices"
        with halovae.parallelize(ours, mode="exact", untiled=True, gather="first") as handle:
            try:
                for _ in range(4):
                    dist.barrier()
                    seconds, growth, result = called(ours, half)
                    calls.append((seconds, growth))
            except (halovae.HalovaeError, torch.OutOfMemoryError) as error:
                tell({"VAE": name, "half": half, "way": way, "not run": str(error)[:200]})
                continue
        report = handle.last
        assert report is not None
        assert result is not None
        memory: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(memory, calls[0][1])
        results[half] = result.cpu() if dist.get_rank() == 0 else None
        tell({
            "VAE": name, "half": half, "way": way, "first s": calls[0][0],
            "warm s": statistics.median(seconds for seconds, _ in calls[2:]),
            "GiB": ", ".join(f"{each:.2f}" for each in memory), "messages": report.messages,
            "waiting s": report.wait_seconds, "distance": "-",
        })  # fmt: skip
        del ours, handle, result
        free(device)
    for way in ("diffusers' tiles", "diffusers, un-tiled"):
        for half in ("decode", "encode") if dist.get_rank() == 0 else ():
            own = gpu_vaes.build(name)
            if "tiles" in way:
                own.enable_tiling()
            for switch in ("use_framewise_encoding", "use_framewise_decoding"):
                if "un-tiled" in way and hasattr(own, switch):
                    setattr(own, switch, False)
            row = {"VAE": name, "half": half, "way": f"{way}, 1 device"}
            try:
                first, growth, result = called(own, half)
                expected = result.cpu().float()
                del result
                warm = called(own, half)[0] if first < 20 else "-"
                gap = "-"
                if half in results:
                    gap = f"{((results[half].float() - expected).norm() / expected.norm()).item():.1e}"
                tell({**row, "first s": first, "warm s": warm, "GiB": f"{growth:.2f}", "distance": gap})
            except RuntimeError as error:
                if not is_shortage(error):
                    raise
                tell({**row, "not run": str(error).split(". GPU")[0]})
            del own
            free(device)


def free(device: torch.device) -> None:
    import gc

    gc.collect()
    if device.type != "cpu":
        torch.cuda.empty_cache()


def online(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    """`online_offline.py` with a model of this width that has two layers, so that it can be saved and loaded."""
    model, found = folder / "model", folder / "online.json"
    height, width, frames = options.size
    _, reason = limited([__file__, "--child", "save", str(model), *passed(options)], None, options.limit)
    if reason:
        return [], f"no model: {reason}"
    words = ["--model", model, "--image", PICTURE, "--height", height, "--width", width, "--frames", frames]
    words += ["--steps", options.steps, "--out", folder / "videos", "--json", found, "--pairs", 0, 1, 4]
    program = Path(__file__).with_name("online_offline.py")
    _, reason = limited([str(word) for word in (program, *words)], None, options.limit)
    return json.loads(found.read_text())["rows"] if found.exists() else [], reason


def save(folder: str, options: argparse.Namespace) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    from halovae.pipelines.demo import byte_tokenizer

    options.layers = 2
    made = pipeline(options, torch.device("cpu" if options.tiny else "cuda"))
    width = made.transformer.config.text_dim
    encoder = UMT5Config(vocab_size=259, d_model=width, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    parts = {"tokenizer": byte_tokenizer(), "text_encoder": UMT5EncoderModel(encoder).to(torch.bfloat16)}
    type(made)(**made.components | parts, boundary_ratio=0.9).save_pretrained(folder)


def child(name: str, options: argparse.Namespace) -> None:
    """One rank of one row."""
    import logging

    logging.disable(logging.WARNING)
    torch.set_grad_enabled(False)
    if name == "save":
        save(options.child[1], options)
        return
    work = generate if name in WAYS else accuracy if name == "accuracy" else whole_clip
    with rank_of("cpu" if options.tiny else "cuda") as device:
        work(name, options, device)


def passed(options: argparse.Namespace) -> list[str]:
    """The options for a child."""
    words = ["--steps", options.steps, "--layers", options.layers, "--size", *options.size]
    return [*map(str, words), *(["--tiny"] if options.tiny else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS)[:-1])
    parser.add_argument("--rows", nargs="+", help="only rows that have one of these words in their name")
    parser.add_argument("--ranks", type=int, help="default: one for each GPU, 2 with --tiny")
    parser.add_argument("--steps", type=int, default=4, help=f"of denoising; totals for {STEPS} are told too")
    parser.add_argument("--size", nargs=3, type=int, metavar=("HEIGHT", "WIDTH", "FRAMES"), default=[512, 768, 49])
    parser.add_argument("--layers", type=int, default=0, help="of each transformer; 0: all 40")
    parser.add_argument("--budget", type=float, default=470, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="small models and pictures on the CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny and options.size == [512, 768, 49]:
        options.size = [64, 96, 9]
    if options.child:
        child(options.child[0], options)
        return
    ranks = options.ranks or (2 if options.tiny else torch.accelerator.device_count())
    end = time.monotonic() + options.budget
    found: dict[str, list[dict[str, Any]]] = {}
    device = "CPU" if options.tiny else torch.cuda.get_device_name()
    title = f"{ranks} of {device}, {'x'.join(map(str, options.size))}, {options.steps} steps"
    facts = machine() | {"ranks": ranks, "device": device}
    print(title, facts, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            for name, limit in PARTS[part]:
                if options.rows and not any(word in name for word in options.rows):
                    continue
                options.limit = min(limit, end - time.monotonic())
                rows, reason = row_of(name, ranks, options, Path(folder))
                if reason:
                    rows.append(
                        {"way" if name in WAYS else "VAE" if part == "vaes" else "what": name, "not run": reason}
                    )
                    print(rows[-1], flush=True)
                found.setdefault(part, []).extend(rows)
                if options.json:  # What is there by now, should the rest not be reached.
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    document = {"title": title, "machine": facts, "size": options.size, "steps": options.steps}
                    options.json.write_text(json.dumps(document | {"parts": found}, indent=1) + "\n")
    for part, rows in found.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        print(f"\n{part}\n" + table([{column: row.get(column, "-") for column in columns} for row in rows]), flush=True)


def row_of(name: str, ranks: int, options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    if options.limit < 15:
        return [], "no time was left"
    if name == "online":
        return online(options, folder)
    caches = {"XDG_CACHE_HOME": str(folder), "TRITON_CACHE_DIR": f"{folder}/triton", "HALOVAE_CACHE": "on"}
    return limited([__file__, "--child", name, *passed(options)], ranks, options.limit, caches)


if __name__ == "__main__":
    main()
