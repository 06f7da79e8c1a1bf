"""Train, evaluate and export the small video VAE that halovae ships for its demo.

    python training/train_vae.py --video media/bigbuckbunny.mp4 --images PHOTOGRAPHS --checkpoint vae.pt --minutes 75
    python training/train_vae.py --video media/bigbuckbunny.mp4 --checkpoint vae.pt --export MODEL
    python training/train_vae.py --video media/bigbuckbunny.mp4 --evaluate MODEL --picture compare.png

The model is an ordinary diffusers `AutoencoderKLWan`. The last 24 frames of the video are never trained on.
"""

import argparse
import math
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from data import VIDEO_SIZES, ClipSource, held_out_clip, read_photographs, training_clip, training_videos
from diffusers import AutoencoderKLWan
from model import LossWeights, build_vae, loss_of, use_faster_norms
from optimizer import Optimizer
from passes import Passes
from PIL import Image

# A step sees short clips and a long one. Trained on 9 frames at most, the model lost its colours after frame 12: the
# causal caches of stacked convolutions reach back tens of frames, and zeros stand for those before the first.
# (frames, clips, crop):
CPU_CLIPS = (((5, 2, 64), (9, 1, 64)), ((21, 1, 64), (33, 1, 48), (49, 1, 48)))
GPU_CLIPS = (((5, 14, 128), (9, 8, 128)), ((21, 6, 96), (33, 4, 96), (49, 3, 96)))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Optimisation settings."""

    learning_rate: float = 2e-3
    warmup_steps: int = 100
    loss: LossWeights = field(default_factory=LossWeights)
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    longest_step: float = 10.0
    """Seconds a step may add to the clock; a process that was suspended keeps its schedule."""
    checkpoint_every: float = 120.0
    """Seconds of training between two checkpoints."""


@dataclass(kw_only=True)
class Run:
    """What a checkpoint holds."""

    vae: AutoencoderKLWan
    ema: dict[str, torch.Tensor]
    optimizer: Optimizer
    steps: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        state = {
            "vae": self.vae.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "seconds": self.seconds,
        }
        # Written aside and renamed: a stop while writing leaves the last checkpoint whole.
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location=self.vae.device)
        self.vae.load_state_dict(state["vae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema, self.steps, self.seconds = state["ema"], state["steps"], state["seconds"]

    def update_ema(self, decay: float) -> None:
        # Young averages forget faster, or they would remember the untrained weights.
        decay = min(decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.ema.values()), list(self.vae.state_dict().values()), 1 - decay)


def learning_rate(run: Run, budget: float, recipe: Recipe) -> float:
    """Linear warm-up in steps, cosine decay in training time, so that a shared machine only costs steps."""
    warmup = min(1.0, (run.steps + 1) / recipe.warmup_steps)
    progress = min(1.0, run.seconds / budget)
    return recipe.learning_rate * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(run: Run, source: ClipSource, *, minutes: float, checkpoint: Path, recipe: Recipe) -> None:
    """Train until `minutes` of training time, counted over all resumed runs, are used up."""
    use_faster_norms(run.vae)
    passes = Passes(partial(loss_of, run.vae, weights=recipe.loss))
    clips_of_a_step = GPU_CLIPS if run.vae.device.type == "cuda" else CPU_CLIPS
    rng = np.random.default_rng(run.steps)
    torch.manual_seed(run.steps)
    saved, errors, stopped = run.seconds, [], threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    while run.seconds < minutes * 60 and not stopped.is_set():
        started = time.perf_counter()
        for shapes in clips_of_a_step:
            frames, size, crop = shapes[run.steps % len(shapes)]
            errors.append(passes.run(source.batch(size, frames, crop, rng)))
        run.optimizer.step(learning_rate(run, minutes * 60, recipe))
        run.steps += 1
        with torch.no_grad():
            run.update_ema(recipe.ema_decay)
        if run.steps % 50 == 0:
            decibel = 10 * math.log10(4 / torch.stack(errors).mean().item())
            errors.clear()
            report = f"step {run.steps}, {run.seconds / 60:.1f} min, training {decibel:.2f} dB"
            print(report, file=sys.stderr, flush=True)
        run.seconds += min(time.perf_counter() - started, recipe.longest_step)
        if run.seconds - saved >= recipe.checkpoint_every:
            run.save(checkpoint)
            saved = run.seconds
    run.save(checkpoint)


@torch.no_grad()
def evaluate(vae: AutoencoderKLWan, video: Path, size: tuple[int, int], picture: Path | None = None) -> float:
    """Return the PSNR in dB of the held-out frames through `encode` and `decode`, over all their values.

    Args:
        vae: the model; it is run in float32.
        video: the file whose last frames were held out.
        size: height and width at which the frames are coded.
        picture: where to write a PNG of originals (left) and reconstructions (right), if anywhere.
    """
    clip = held_out_clip(video, size)
    vae = vae.eval().float()
    result = vae.decode(vae.encode(clip).latent_dist.mode()).sample.clamp(-1, 1)
    if picture is not None:
        both = torch.cat([clip, result], dim=-1)[0, :, :: clip.shape[2] // 2]
        rows = both.permute(1, 2, 3, 0).flatten(0, 1).add(1).mul(127.5).round().byte()
        Image.fromarray(rows.numpy()).save(picture)
    return 10 * math.log10(4 / (result - clip).square().mean().item())


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, video: Path) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each latent channel over the training frames."""
    latents = vae.encode(training_clip(video, VIDEO_SIZES[0])).latent_dist.mode()
    values = latents[0].flatten(1)
    return [round(v, 4) for v in values.mean(1).tolist()], [round(v, 4) for v in values.std(1).tolist()]


def export(checkpoint: Path, video: Path, folder: Path) -> None:
    """Write the averaged weights of a checkpoint as a bfloat16 diffusers model."""
    vae = build_vae().eval()
    vae.load_state_dict(torch.load(checkpoint, weights_only=True, map_location="cpu")["ema"])
    mean, std = latent_statistics(vae, video)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.to(torch.bfloat16).save_pretrained(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, required=True)
    parser.add_argument("--images", type=Path, help="folder of photographs")
    parser.add_argument("--checkpoint", type=Path, help="file to write while training, to resume and to export")
    parser.add_argument("--minutes", type=float, default=75.0, help="training time, over all resumed runs")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    parser.add_argument("--device", default="cpu", help="where to train, cpu or cuda; evaluation is on the CPU")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write --checkpoint as a model")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="measure a model on the held-out frames")
    parser.add_argument("--size", type=int, nargs=2, default=VIDEO_SIZES[0], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--picture", type=Path, help="PNG of originals and reconstructions")
    arguments = parser.parse_args()
    if arguments.evaluate is None and arguments.checkpoint is None:
        parser.error("--checkpoint is needed to train or to export")
    if arguments.evaluate is None and arguments.export is None and arguments.images is None:
        parser.error("--images is needed to train")
    return arguments


def main() -> None:
    """Run one of the three commands of the module's docstring."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    # Numbers below 1e-38 appear in the first backward passes and make CPU convolutions many times slower.
    torch.set_flush_denormal(True)
    if arguments.evaluate is not None:
        vae = AutoencoderKLWan.from_pretrained(arguments.evaluate, torch_dtype=torch.float32)
        print(f"{evaluate(vae, arguments.video, tuple(arguments.size), arguments.picture):.2f} dB")
        return
    if arguments.export is not None:
        export(arguments.checkpoint, arguments.video, arguments.export)
        return
    recipe = Recipe()
    torch.manual_seed(0)
    vae = build_vae().to(arguments.device)
    ema = {name: value.clone() for name, value in vae.state_dict().items()}
    optimizer = Optimizer(vae, learning_rate=recipe.learning_rate, clip_norm=recipe.clip_norm)
    run = Run(vae=vae, ema=ema, optimizer=optimizer)
    if arguments.resume:
        run.load(arguments.checkpoint)
    source = ClipSource(
        videos=[video.to(vae.device) for video in training_videos(arguments.video)],
        photographs=[picture.to(vae.device) for picture in read_photographs(arguments.images)],
    )
    train(run, source, minutes=arguments.minutes, checkpoint=arguments.checkpoint, recipe=recipe)


if __name__ == "__main__":
    main()
