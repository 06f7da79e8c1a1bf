"""What the VAE's part of image-to-video costs on N ranks: not parallel, decode parallel, both halves parallel.

    python benchmarks/image_to_video.py --ranks 2

Runs a whole pipeline, by default the demonstration model, built on the spot: its transformer is tiny, so the VAE's
share is larger than in a real model. One thread per rank, sequences shared by all ranks (Ulysses). Rows take turns;
seconds are medians, of the first rank, after one round of warm-up. The probe that exact mode makes once is left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import report, run_ranks
from PIL import Image

from halovae import comm, media
from halovae.pipelines.generation_settings import Generation, Setup
from halovae.pipelines.load import find_pipeline, load_pipeline
from halovae.pipelines.parallel_vae import parallel_vae
from halovae.pipelines.runner import Runner
from halovae.pipelines.stages import DENOISE, OTHER, TEXT_ENCODE, VAE_DECODE, VAE_ENCODE

ROWS = {
    "VAE not parallel": {"vae_encode": False, "vae_decode": False},
    "decode": {"vae_encode": False, "vae_decode": True},
    "decode and encode": {"vae_encode": True, "vae_decode": True},
}
STAGES = (TEXT_ENCODE, VAE_ENCODE, DENOISE, VAE_DECODE, OTHER)
PICTURE = Path(__file__).parents[1] / "media" / "coffee.png"


def measure(rank: int, options: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Median seconds of each stage, for each row."""
    world = comm.world()
    setup = Setup(dtype="float32", ulysses_degree=world.size, vae_mode=options["mode"], **ROWS["VAE not parallel"])
    pipeline = load_pipeline(find_pipeline(options["model"], "image-to-video"), setup)
    height, width = options["height"], options["width"]
    image = Image.fromarray(media.read(PICTURE, height=height, width=width).frames[0])
    generation = Generation(
        prompt="a cup of coffee", image=image, height=height, width=width, num_frames=options["frames"],
        num_inference_steps=options["steps"], seed=0,
    )  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
    with Runner(pipeline, setup, world, torch.device("cpu")) as runner:
        for turn in range(options["repeats"] + 1):
            for name, halves in ROWS.items():
                with parallel_vae(pipeline.vae, replace(setup, **halves), world, runner.note):
                    seconds = runner.run(generation).seconds
                if turn:
                    found[name].append(seconds)
    return {
        name: {stage: statistics.median(run.get(stage, 0.0) for run in runs) for stage in STAGES}
        for name, runs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: the demonstration model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--mode", choices=("exact", "tile"), default="exact")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given = {name: value for name, value in vars(options).items() if name != "json"}
        if options.model is None:
            from halovae.pipelines.demo import make_demo_model

            given["model"] = f"{folder}/demo"
            make_demo_model(Path(given["model"]))
        first = run_ranks(options.ranks, measure, given)[0]
    rows: list[dict[str, Any]] = []
    for name, seconds in first.items():
        total = sum(seconds.values())
        rows.append({"VAE on all ranks": name, **{f"{s} s": v for s, v in seconds.items()}, "total s": total})
        rows[-1]["speed-up"] = rows[0]["total s"] / total
    title = (
        f"image-to-video, {options.model or 'demonstration model'}, {options.width}x{options.height}, "
        f"{options.frames} frames, {options.steps} steps, {options.mode} mode, {options.ranks} ranks"
    )
    report(title, rows, options.json)


if __name__ == "__main__":
    main()
