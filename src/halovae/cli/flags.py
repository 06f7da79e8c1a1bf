"""The options that commands share, and what their values mean."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from halovae.cli import usage


class Dtype(str, Enum):
    """Names of the number formats, as torch has them."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


Source = Annotated[Path, typer.Argument(metavar="INPUT", help="A video or an image.", show_default=False)]
VideoOutput = Annotated[
    Path,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Write the result to this file: an .mp4, or a .png for one frame.",
        show_default=False, rich_help_panel=usage.FILES,
    ),
]  # fmt: skip
LatentsOutput = Annotated[
    Path,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Write the latents to this file, a .safetensors.",
        show_default=False, rich_help_panel=usage.FILES,
    ),
]  # fmt: skip
Model = Annotated[
    str | None,
    typer.Option(
        metavar="DIR_OR_ID",
        help="Use this VAE: the folder of a diffusers VAE or pipeline, or a hub id such as "
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers.",
        show_default="the small VAE that ships with halovae",
        rich_help_panel=usage.FILES,
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Start this many processes on this machine. Under torchrun leave it out: its processes are used.",
        show_default="1",
        rich_help_panel=usage.RANKS,
    ),
]
Axis = Annotated[
    str,
    typer.Option(
        metavar="CUT",
        help="Cut the picture like this in exact mode: auto, height, width, or ROWSxCOLS such as 2x4.",
        rich_help_panel=usage.VAE,
    ),
]
Frames = Annotated[
    str | None,
    typer.Option(
        metavar="A:B", help="Take frames A to B - 1, counted from 0.", show_default="all", rich_help_panel=usage.CLIP
    ),
]
Height = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="PIXELS",
        help="Make the clip this high: it is scaled to cover the size, and cropped around its centre.",
        show_default="as in the file, or in proportion to --width",
        rich_help_panel=usage.CLIP,
    ),
]
Width = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="PIXELS",
        help="Make the clip this wide, in the same way.",
        show_default="as in the file, or in proportion to --height",
        rich_help_panel=usage.CLIP,
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Compute with this number format: float32, float64, bfloat16 or float16.",
        show_default="float32 on cpu, else bfloat16",
        rich_help_panel=usage.DEVICE,
    ),
]
VaeEncodeDtype = Annotated[
    Dtype | None,
    typer.Option(
        "--vae-encode-dtype", metavar="TYPE", help="Let the VAE encode in this number format.",
        show_default="as the VAE", rich_help_panel=usage.DEVICE,
    ),
]  # fmt: skip
VaeDecodeDtype = Annotated[
    Dtype | None,
    typer.Option(
        "--vae-decode-dtype", metavar="TYPE", help="Let the VAE decode in this number format.",
        show_default="as the VAE", rich_help_panel=usage.DEVICE,
    ),
]  # fmt: skip
Device = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="Run on this kind of device: cpu, cuda, npu, xpu, ...",
        show_default="the accelerator if there is one",
        rich_help_panel=usage.DEVICE,
    ),
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Run the VAE on one rank too, and tell how far the results differ.",
        rich_help_panel=usage.REPORTS,
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write the numbers to this file, too.", show_default=False,
        rich_help_panel=usage.REPORTS,
    ),
]  # fmt: skip
Lossless = Annotated[
    bool,
    typer.Option(
        "--lossless", help="Keep every pixel of an mp4, as RGB: a larger file, which few players show.",
        rich_help_panel=usage.CONTENT,
    ),
]  # fmt: skip
ReportFolder = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="DIR", help="Write a page with pictures and numbers to this folder.", show_default=False,
        rich_help_panel=usage.REPORTS,
    ),
]  # fmt: skip
