"""The flags of the commands that run a whole pipeline."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from halovae.cli.options import Dtype


class VaeMode(str, Enum):
    """How the VAE runs on ranks."""

    exact = "exact"
    tile = "tile"
    auto = "auto"


_ITS_OWN = "the pipeline's own"

PipelineModel = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="DIR_OR_ID",
        help="Folder of a diffusers pipeline, or a hub id such as Wan-AI/Wan2.2-I2V-A14B-Diffusers.",
        show_default=False,
    ),
]
Image = Annotated[Path, typer.Option("--image", metavar="FILE", help="The image to begin with.", show_default=False)]
LastImage = Annotated[
    Path | None, typer.Option("--last-image", metavar="FILE", help="The image to end with.", show_default=False)
]
Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="FILE", help="Write here: .mp4, or .png for one frame.")
]
PictureOutput = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Write here: .png.")]
Prompt = Annotated[str | None, typer.Option("--prompt", help="What to show.", show_default=False)]
NegativePrompt = Annotated[str | None, typer.Option("--negative-prompt", help="What not to show.", show_default=False)]
Height = Annotated[
    int | None,
    typer.Option(min=1, metavar="PIXELS", help="Of the result.", show_default="from the image's proportions"),
]
Width = Annotated[
    int | None,
    typer.Option(min=1, metavar="PIXELS", help="Of the result.", show_default="from the image's proportions"),
]
NumFrames = Annotated[
    int | None, typer.Option("--num-frames", min=1, metavar="N", help="Of the video.", show_default=_ITS_OWN)
]
Steps = Annotated[
    int | None,
    typer.Option("--num-inference-steps", min=1, metavar="N", help="Of denoising.", show_default=_ITS_OWN),
]
GuidanceScale = Annotated[
    float | None, typer.Option("--guidance-scale", help="How much the prompt counts.", show_default=_ITS_OWN)
]
GuidanceScaleHigh = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale-high",
        help="The same for the second expert (transformer_2; the pipeline's guidance_scale_2).",
        show_default="as --guidance-scale",
    ),
]
TrueCfgScale = Annotated[
    float | None,
    typer.Option(
        "--true-cfg-scale",
        help="How much the prompt counts against the negative one, in pipelines that know both scales.",
        show_default=_ITS_OWN,
    ),
]
Strength = Annotated[
    float | None,
    typer.Option("--strength", min=0.0, max=1.0, help="How much may change, 0 to 1.", show_default=_ITS_OWN),
]
FlowShift = Annotated[
    float | None, typer.Option("--flow-shift", help="Of the scheduler's noise levels.", show_default="the model's own")
]
BoundaryRatio = Annotated[
    float | None,
    typer.Option(
        "--boundary-ratio", help="Noise level at which the second expert takes over.", show_default="the model's own"
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, metavar="N", help="Of the noise.", show_default="drawn once for all ranks, and said"),
]
Fps = Annotated[int, typer.Option("--fps", min=1, max=1000, help="Frames per second of the video.")]
Crf = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=51,
        metavar="N",
        help="How much the mp4 loses: 0 nothing, which few players show; 51 most.",
        show_default="16",
    ),
]
VaeModeOption = Annotated[
    VaeMode | None,
    typer.Option(
        "--vae-mode",
        help="exact: shards with halo exchange, the un-tiled result; tile: the VAE's own tiles, spread; "
        "auto: what is predicted to be faster on this link, and possible.",
        show_default="exact; tile for a VAE that comes tiled",
    ),
]
VaeUseTiling = Annotated[bool, typer.Option("--vae-use-tiling", help="The same as --vae-mode tile.")]
VaeUseSlicing = Annotated[bool, typer.Option("--vae-use-slicing", help="The VAE takes a batch one by one.")]
VaeEncode = Annotated[bool, typer.Option("--vae-encode/--no-vae-encode", help="Encode on all ranks, or on each alone.")]
VaeDecode = Annotated[bool, typer.Option("--vae-decode/--no-vae-decode", help="Decode on all ranks, or on each alone.")]
VaeSize = Annotated[
    int | None,
    typer.Option(
        "--vae-patch-parallel-size", metavar="N", help="Ranks that work on the VAE; 1: none of it is parallel.",
        show_default="all",
    ),
]  # fmt: skip
Ulysses = Annotated[
    int, typer.Option("--ulysses-degree", metavar="N", help="Ranks that share a sequence, by attention heads.")
]
Ring = Annotated[
    int, typer.Option("--ring-degree", metavar="N", help="Ranks that share a sequence, by keys and values in turn.")
]
LayerwiseOffload = Annotated[
    bool,
    typer.Option("--enable-layerwise-offload", help="Weights stay on the host; each layer is fetched when it is due."),
]
CpuOffload = Annotated[
    bool,
    typer.Option("--enable-cpu-offload", help="Weights stay on the host; each part is fetched when it is due."),
]
VaeDtype = Annotated[
    Dtype | None, typer.Option("--vae-dtype", help="Number format of the VAE.", show_default="as --dtype")
]
AttentionBackend = Annotated[
    str | None,
    typer.Option("--attention-backend", metavar="NAME", help="Of the transformer, as diffusers names them.",
                 show_default="diffusers' own"),
]  # fmt: skip
Compile = Annotated[bool, typer.Option("--compile", help="Compile the transformer's blocks.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and stop: only configs are loaded, nothing is started.")
]
