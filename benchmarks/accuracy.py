"""How far exact mode and tiles move a VAE's result, in latents and in pixels, on real pictures.

    python benchmarks/accuracy.py --json benchmarks/results/accuracy-2core.json --markdown

The VAE that ships with halovae and two small ones with random weights, on parts of the shipped media. Each way of
running them is compared with the un-tiled result of one rank in the same precision, and, for the VAE that is trained,
with the source; bfloat16 is compared with float32 too. Tiles overlap by a quarter of their side, as diffusers' do, and
are cut so small that pictures of a size that a processor bears have several. Last, an image-to-video pipeline (the
demonstration model) makes a video with a tiled and with an exact encode of its image.

`--quick` runs 2 ranks and the smaller pictures only; `--full` adds a picture of 1280 x 720.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, DiffusionPipeline
from harness import machine, report, run_ranks, table
from PIL import Image

import halovae
from halovae import media
from halovae.evaluation import CutLines, compare_clips, compare_latents, seam_energy
from halovae.media import codec, models, vae_limits
from halovae.pipelines.demo import make_demo_model

Way = tuple[np.ndarray, ...]
MEDIA = Path(__file__).parent.parent / "media"
BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
TILE, OVERLAP = 96, 24
"""Pixels."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A VAE and a clip."""

    vae: str
    clip: str
    frames: tuple[int, int]
    size: tuple[int, int]
    """Height and width."""
    ranks: tuple[int, ...] = (2,)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    in_sets: str = "quick default full"

    @property
    def name(self) -> str:
        return f"{self.clip} {self.frames[1] - self.frames[0]}x{self.size[1]}x{self.size[0]}"


BUNNY, COFFEE, CAT = "bigbuckbunny.mp4", "coffee.png", "chelsea.png"
LARGE = {"clip": BUNNY, "frames": (20, 21), "dtypes": ("float32",)}
CASES = [
    Case(vae="shipped", clip=BUNNY, frames=(108, 113), size=(256, 256), ranks=(1, 2, 3, 4)),
    Case(vae="shipped", clip=COFFEE, frames=(0, 1), size=(256, 384), ranks=(2, 4)),
    Case(vae="shipped", size=(480, 832), in_sets="default full", **LARGE),
    Case(vae="shipped", size=(720, 1280), in_sets="full", **LARGE),
    Case(vae="random video", clip=BUNNY, frames=(40, 45), size=(256, 256)),
    Case(vae="random image", clip=CAT, frames=(0, 1), size=(256, 384)),
]
VIDEO = {"prompt": "a cup of coffee", "height": 192, "width": 288, "num_frames": 9, "num_inference_steps": 4}


def build(name: str, dtype: str) -> Any:
    """A VAE in tile settings of `TILE` and `OVERLAP`, tiling off."""
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    if name == "shipped":
        vae = models.load(models.find(None), dtype=kind, device=torch.device("cpu"))
    elif name == "random video":
        vae = AutoencoderKLWan(base_dim=8, z_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    else:
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        vae = AutoencoderKL(**blocks, block_out_channels=[16, 32, 32, 32], latent_channels=4, norm_num_groups=8)
    vae = vae.to(kind).eval().requires_grad_(False)
    if isinstance(vae, AutoencoderKL):
        vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = TILE, TILE // 8, OVERLAP / TILE
    else:
        vae.enable_tiling(TILE, TILE, TILE - OVERLAP, TILE - OVERLAP)
        vae.disable_tiling()
    return vae


def source(case: Case) -> np.ndarray:
    frames = media.FrameRange(*case.frames)
    return media.read(MEDIA / case.clip, frames=frames, height=case.size[0], width=case.size[1]).frames


def on_rank(rank: int, case: Case, dtype: str, modes: Sequence[str], one: Way | None) -> dict[str, Way] | None:
    """What each mode makes of the clip: latents, these decoded, and the un-tiled latents decoded.

    The last compares the decode on its own. Under "one" stands the VAE as it is; `one` is that, if it is known already.
    """
    vae = build(case.vae, dtype)
    limits = vae_limits.limits_of(vae)
    clip = codec.to_tensor(source(case), getattr(torch, dtype), torch.device("cpu"))
    found: dict[str, Way] = {}
    if one is None:
        latents = codec.encode(vae, limits, clip)
        decoded = codec.decode(vae, limits, latents).float().numpy()
        found["one"] = one = latents.float().numpy(), decoded, decoded
    untiled = torch.from_numpy(one[0]).to(clip.dtype)
    for mode in modes:
        with halovae.parallelize(vae, mode=mode, verify=False):
            latents = codec.encode(vae, limits, clip)
            parts = latents, codec.decode(vae, limits, latents), codec.decode(vae, limits, untiled)
        found[mode] = tuple(part.float().numpy() for part in parts)
    return found if rank == 0 else None


def levels(sample: np.ndarray) -> np.ndarray:
    """(3, frames, height, width) of -1 to 1 to (frames, height, width, 3) of 0 to 255, not rounded."""
    return (sample.clip(-1, 1) + 1).transpose(1, 2, 3, 0) * np.float32(127.5)


def rows(case: Case, sets: str) -> Iterator[dict[str, Any]]:
    """A row for each precision, number of ranks and mode."""
    float32: Way | None = None
    for dtype in case.dtypes:
        one: Way | None = None
        for ranks in case.ranks:
            if sets == "quick" and ranks != 2:
                continue
            # Tiles are the same bit by bit on any number of ranks, which the tests hold: measured on up to 2.
            modes = {1: ("tile",), 2: ("exact", "tile")}.get(ranks, ("exact",))
            found = run_ranks(ranks, on_rank, case, dtype, modes, one)[0]
            one = found.get("one", one)
            float32 = float32 or one
            yield from (row(case, ranks, dtype, mode, one, found[mode], float32) for mode in modes)


def row(case: Case, ranks: int, dtype: str, mode: str, one: Way, other: Way, float32: Way) -> dict[str, Any]:
    tiles = CutLines.every((TILE - OVERLAP,) * 2, case.size, (OVERLAP,) * 2)
    # The lines in latents are those in pixels, eight times as close.
    coarse = CutLines.every(((TILE - OVERLAP) // 8,) * 2, (case.size[0] // 8, case.size[1] // 8), (OVERLAP // 8,) * 2)
    encode = compare_latents(torch.from_numpy(one[0]), torch.from_numpy(other[0]))
    gap = np.square(other[0] - one[0])
    energy = gap.reshape(-1, *gap.shape[-2:]).mean(axis=0)
    decode = compare_clips(levels(one[2]), levels(other[2]), tiles)
    both = compare_clips(levels(one[1]), levels(other[1]), tiles)
    trained = case.vae == "shipped"
    kept = [compare_clips(source(case), levels(way[1]), tiles) for way in (one, other)] if trained else []
    far = [_distance(way, float32) for way in (one, other)] if dtype != "float32" else []
    return {
        "vae": case.vae,
        "clip": case.name,
        "dtype": dtype,
        "ranks": ranks,
        "mode": mode,
        "encode L2": encode.relative_l2,
        "encode largest": encode.largest,
        "encode seam": seam_energy(energy, coarse, reach=1),
        "decode PSNR": decode.psnr,
        "decode largest": decode.largest,
        "decode seam": decode.seam,
        "both PSNR": both.psnr,
        "both SSIM": both.ssim,
        "both drift": both.drift,
        "source PSNR": kept[1].psnr if kept else None,
        "source PSNR one rank": kept[0].psnr if kept else None,
        "to float32": far[1] if far else None,
        "to float32 one rank": far[0] if far else None,
    }


def _distance(way: Way, float32: Way) -> float:
    """Relative L2 distance of the decoded latents to those of float32 on one rank."""
    return float(np.linalg.norm(way[1] - float32[1]) / np.linalg.norm(float32[1]))


def finite(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For JSON, where null stands for what is infinite."""
    return [{k: None if isinstance(v, float) and math.isinf(v) else v for k, v in row.items()} for row in rows]


def short(found: Sequence[dict[str, Any]]) -> str:
    """What exact mode and tiles do to each case on two ranks."""
    return table(
        [
            {
                "VAE, clip": f"{row['vae']}, {row['clip']}",
                "precision": row["dtype"],
                "mode": row["mode"],
                "encode: relative L2": f"{row['encode L2']:.1e}",
                "decode: PSNR, dB": _digits(row["decode PSNR"], 1),
                "both: PSNR, dB": _digits(row["both PSNR"], 1),
                "seam energy": _digits(row["decode seam"], 2),
                "to the source, dB": _digits(row["source PSNR"], 2),
                "of one rank": _digits(row["source PSNR one rank"], 2),
            }
            for row in found
            if row["ranks"] == 2
        ]
    )


def write_table(found: Sequence[dict[str, Any]], video: dict[str, Any]) -> None:
    """Put the table between its marks in docs/accuracy.md."""
    facts = machine()
    made = f"2 ranks, one thread each, on {facts['processor']}, {facts['cores']} cores, torch {facts['torch']}"
    notes = f"`python benchmarks/accuracy.py --markdown`, {made}, {facts['date']}."
    moved = (
        f"The {video['video']} of the demonstration model with a tiled encode of its image, against an exact one: PSNR "
        f"{_digits(video['PSNR'], 1)} dB, SSIM {video['SSIM']:.4f}, largest difference {video['largest']:.3g} of 255."
    )
    path = MEDIA.parent / "docs" / "accuracy.md"
    before, rest = path.read_text().split(BEGIN)
    below = "\n\n".join(fill(text, 120, break_on_hyphens=False) for text in (moved, notes))
    path.write_text(f"{before}{BEGIN}\n{short(found)}\n\n{below}\n{END}{rest.split(END)[1]}")


def _digits(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return "identical" if math.isinf(value) else f"{value:.{digits}f}"


def make_video(rank: int, folder: str, mode: str) -> np.ndarray | None:
    """The demonstration model's video of a photograph, with its image encoded in this mode."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_tiling(TILE, TILE, TILE - OVERLAP, TILE - OVERLAP)
    pipeline.vae.disable_tiling()
    image = Image.fromarray(media.read(MEDIA / COFFEE, height=VIDEO["height"], width=VIDEO["width"]).frames[0])
    with halovae.parallelize(pipeline.vae, mode=mode, halves=("encode",)):
        made = pipeline(image=image, generator=torch.Generator().manual_seed(0), output_type="np", **VIDEO)
    return np.asarray(made.frames[0]) * 255 if rank == 0 else None


def video_row() -> dict[str, Any]:
    """How far a tiled encode moves the video, against an exact one."""
    with tempfile.TemporaryDirectory() as folder:
        make_demo_model(Path(folder) / "model")
        exact, tile = (run_ranks(2, make_video, f"{folder}/model", mode)[0] for mode in ("exact", "tile"))
    found = compare_clips(exact, tile)
    frames, height, width = exact.shape[:3]
    numbers = {"PSNR": found.psnr, "SSIM": found.ssim, "largest": found.largest, "drift": found.drift}
    return {"video": f"image-to-video {frames}x{width}x{height}", "compared": "tiled encode with exact", **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="sets", action="store_const", const="quick", default="default")
    parser.add_argument("--full", dest="sets", action="store_const", const="full")
    parser.add_argument("--markdown", action="store_true", help="put the short table into docs/accuracy.md")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    started = time.perf_counter()
    for case in CASES:
        for line in rows(case, options.sets) if options.sets in case.in_sets.split() else ():
            found.append(line)
            print(f"{time.perf_counter() - started:.0f} s", line, file=sys.stderr, flush=True)
    video = video_row()
    print(f"{time.perf_counter() - started:.0f} s", video, file=sys.stderr, flush=True)
    report("accuracy of exact mode and of tiles against one rank un-tiled", finite(found), None)
    print("\n" + table(finite([video])))
    if options.markdown:
        write_table(found, video)
    if options.json:
        document = {"machine": machine(), "rows": finite(found), "video": finite([video])[0]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
