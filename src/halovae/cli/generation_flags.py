"""The flags of the commands that run a whole pipeline."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from halovae.cli import mode_flags, usage
from halovae.cli.flags import Dtype


class VaeMode(str, Enum):
    """How the VAE runs on ranks."""

    exact = "exact"
    tile = "tile"
    auto = "auto"


_ITS_OWN = "the pipeline's own"
_AS_IMAGE = "the image's proportions, at about the pipeline's own number of pixels"

PipelineModel = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="DIR_OR_ID",
        help="Use this pipeline: a folder in diffusers' format, or a hub id such as Wan-AI/Wan2.2-I2V-A14B-Diffusers.",
        show_default=False,
        rich_help_panel=usage.FILES,
    ),
]
Image = Annotated[
    Path,
    typer.Option(
        "--image", metavar="FILE", help="Begin with this image.", show_default=False, rich_help_panel=usage.FILES
    ),
]
LastImage = Annotated[
    Path | None,
    typer.Option(
        "--last-image", metavar="FILE", help="End with this image.", show_default=False, rich_help_panel=usage.FILES
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Write the result to this file: an .mp4, or a .png for one frame.",
        rich_help_panel=usage.FILES,
    ),
]  # fmt: skip
PictureOutput = Annotated[
    Path,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Write the result to this file, a .png.", rich_help_panel=usage.FILES
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt", metavar="TEXT", help="Show what this says.", show_default=False, rich_help_panel=usage.CONTENT
    ),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        "--negative-prompt", metavar="TEXT", help="Keep away from what this says.", show_default=False,
        rich_help_panel=usage.CONTENT,
    ),
]  # fmt: skip
Height = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="PIXELS", help="Make the result this high.", show_default=_AS_IMAGE,
        rich_help_panel=usage.CONTENT,
    ),
]  # fmt: skip
Width = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="PIXELS", help="Make the result this wide.", show_default=_AS_IMAGE,
        rich_help_panel=usage.CONTENT,
    ),
]  # fmt: skip
OwnHeight = Annotated[
    int | None,
    typer.Option(
        "--height", min=1, metavar="PIXELS", help="Make the result this high.", show_default=_ITS_OWN,
        rich_help_panel=usage.CONTENT,
    ),
]  # fmt: skip
OwnWidth = Annotated[
    int | None,
    typer.Option(
        "--width", min=1, metavar="PIXELS", help="Make the result this wide.", show_default=_ITS_OWN,
        rich_help_panel=usage.CONTENT,
    ),
]  # fmt: skip
NumFrames = Annotated[
    int | None,
    typer.Option(
        "--num-frames", min=1, metavar="N", help="Make so many frames.", show_default=_ITS_OWN,
        rich_help_panel=usage.CONTENT,
    ),
]  # fmt: skip
Strength = Annotated[
    float | None,
    typer.Option(
        "--strength", min=0.0, max=1.0, metavar="SHARE", help="Let so much of the image change, from 0 to 1.",
        show_default=_ITS_OWN, rich_help_panel=usage.CONTENT,
    ),
]  # fmt: skip
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, metavar="N", help="Draw the noise from this seed.",
        show_default="drawn once for all ranks, and told", rich_help_panel=usage.CONTENT,
    ),
]  # fmt: skip
Fps = Annotated[
    int,
    typer.Option(
        "--fps", min=1, max=1000, metavar="N", help="Show so many frames per second.", rich_help_panel=usage.CONTENT
    ),
]
Crf = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=51,
        metavar="N",
        help="Let the mp4 lose so much: 0 is nothing, which few players show, and 51 is most.",
        show_default="16",
        rich_help_panel=usage.CONTENT,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--num-inference-steps", min=1, metavar="N", help="Denoise in so many steps.", show_default=_ITS_OWN,
        rich_help_panel=usage.DENOISING,
    ),
]  # fmt: skip
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale", metavar="SCALE", help="Let the prompt count so much.", show_default=_ITS_OWN,
        rich_help_panel=usage.DENOISING,
    ),
]  # fmt: skip
GuidanceScaleHigh = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale-high",
        metavar="SCALE",
        help="Let the prompt count so much for the second expert (transformer_2; the pipeline's guidance_scale_2).",
        show_default="as --guidance-scale",
        rich_help_panel=usage.DENOISING,
    ),
]
TrueCfgScale = Annotated[
    float | None,
    typer.Option(
        "--true-cfg-scale",
        metavar="SCALE",
        help="Let the prompt count so much against the negative one, in pipelines that know both scales.",
        show_default=_ITS_OWN,
        rich_help_panel=usage.DENOISING,
    ),
]
FlowShift = Annotated[
    float | None,
    typer.Option(
        "--flow-shift", metavar="SHIFT", help="Shift the scheduler's noise levels by this factor.",
        show_default="the model's own", rich_help_panel=usage.DENOISING,
    ),
]  # fmt: skip
BoundaryRatio = Annotated[
    float | None,
    typer.Option(
        "--boundary-ratio",
        metavar="SHARE",
        help="Let the second expert take over below this noise level, from 0 to 1.",
        show_default="the model's own",
        rich_help_panel=usage.DENOISING,
    ),
]
Ulysses = Annotated[
    int,
    typer.Option(
        "--ulysses-degree", metavar="N", help="Let so many ranks share a sequence by attention heads.",
        rich_help_panel=usage.RANKS,
    ),
]  # fmt: skip
Ring = Annotated[
    int,
    typer.Option(
        "--ring-degree", metavar="N", help="Let so many ranks share a sequence by passing on keys and values.",
        rich_help_panel=usage.RANKS,
    ),
]  # fmt: skip
VaeModeOption = Annotated[
    VaeMode | None,
    typer.Option(
        "--vae-mode",
        metavar=mode_flags.WORDS,
        help=mode_flags.HELP,
        show_default=mode_flags.DEFAULT,
        rich_help_panel=usage.VAE,
    ),
]
VaeUntiled = Annotated[bool, typer.Option("--vae-untiled", help=mode_flags.UNTILED_HELP, rich_help_panel=usage.VAE)]
VaeUseTiling = Annotated[
    bool,
    typer.Option(
        "--vae-use-tiling", help=mode_flags.TILING_HELP.format("--vae-mode tile"), rich_help_panel=usage.VAE
    ),
]  # fmt: skip
VaeUseSlicing = Annotated[
    bool,
    typer.Option(
        "--vae-use-slicing", help="Give the pictures of a batch to the VAE one by one.", rich_help_panel=usage.VAE
    ),
]
VaeEncode = Annotated[
    bool,
    typer.Option(
        "--vae-encode/--no-vae-encode", help="Encode on all ranks together, or the whole on each.",
        rich_help_panel=usage.VAE,
    ),
]  # fmt: skip
VaeDecode = Annotated[
    bool,
    typer.Option(
        "--vae-decode/--no-vae-decode", help="Decode on all ranks together, or the whole on each.",
        rich_help_panel=usage.VAE,
    ),
]  # fmt: skip
VaeSize = Annotated[
    int | None,
    typer.Option(
        "--vae-patch-parallel-size",
        metavar="N",
        help=mode_flags.SIZE_HELP,
        show_default="all",
        rich_help_panel=usage.VAE,
    ),
]
LayerwiseOffload = Annotated[
    bool,
    typer.Option(
        "--enable-layerwise-offload",
        help="Keep weights on the host, and fetch each layer when it is due.",
        rich_help_panel=usage.DEVICE,
    ),
]
CpuOffload = Annotated[
    bool,
    typer.Option(
        "--enable-cpu-offload",
        help="Keep weights on the host, and fetch each part of the pipeline when it is due.",
        rich_help_panel=usage.DEVICE,
    ),
]
VaeDtype = Annotated[
    Dtype | None,
    typer.Option(
        "--vae-dtype", metavar="TYPE", help="Let the VAE compute with this number format.", show_default="as --dtype",
        rich_help_panel=usage.DEVICE,
    ),
]  # fmt: skip
AttentionBackend = Annotated[
    str | None,
    typer.Option(
        "--attention-backend",
        metavar="NAME",
        help="Use this attention in the transformer, by diffusers' name for it.",
        show_default="diffusers' own",
        rich_help_panel=usage.DEVICE,
    ),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the transformer's blocks.", rich_help_panel=usage.DEVICE)
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the plan and stop: only configs are loaded, nothing is started.",
        rich_help_panel=usage.REPORTS,
    ),
]
