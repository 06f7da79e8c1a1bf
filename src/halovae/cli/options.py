"""The options that commands share, and what their values mean."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from halovae.cli.modes import Work
from halovae.errors import InputError


class Dtype(str, Enum):
    """Names of the number formats, as torch has them."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


Source = Annotated[Path, typer.Argument(metavar="INPUT", help="A video or an image.", show_default=False)]
VideoOutput = Annotated[
    Path,
    typer.Option("-o", "--output", metavar="FILE", help="Write here: .mp4, or .png for one frame.", show_default=False),
]
LatentsOutput = Annotated[
    Path, typer.Option("-o", "--output", metavar="FILE", help="Write here: .safetensors.", show_default=False)
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="DIR_OR_ID",
        help="Folder of a diffusers VAE or pipeline, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers.",
        show_default="the small VAE that ships with halovae",
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Start this many processes on this machine. Under torchrun leave it out: its processes are used.",
        show_default="1",
    ),
]
Axis = Annotated[
    str, typer.Option(metavar="CUT", help="How to cut the picture: auto, height, width, or ROWSxCOLS such as 2x4.")
]
Frames = Annotated[
    str | None,
    typer.Option(metavar="A:B", help="Frames A to B - 1, counted from 0.", show_default="all"),
]
Height = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="PIXELS", help="Scale to cover this, then crop around the centre.", show_default="as in the file"
    ),
]
Width = Annotated[int | None, typer.Option(min=1, metavar="PIXELS", help="As --height.", show_default="as in the file")]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype", help="Number format of weights and pictures.", show_default="float32 on cpu, else bfloat16"
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="KIND", help="cpu, cuda, npu, xpu, ...", show_default="the accelerator if there is one"),
]
Compare = Annotated[
    bool, typer.Option("--compare", help="Run the VAE without parallelism too, and show how far the results differ.")
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here too.", show_default=False)
]

ReportFolder = Annotated[
    Path | None,
    typer.Option("--report", metavar="DIR", help="Write a page with pictures and numbers here.", show_default=False),
]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every command that runs a VAE on ranks needs to know."""

    model: str | None = None
    ranks: int | None = None
    axis: str | tuple[int, int] = "auto"
    dtype: str | None = None
    device: str | None = None
    work: Work = field(default_factory=Work)


def parse_axis(text: str, mode: str | None = None) -> str | tuple[int, int]:
    """From the words of `--axis`.

    Raises:
        InputError: another word, a grid without rows or columns, or a cut where there are tiles.
    """
    if mode == "tile" and text != "auto":
        raise InputError(f"--axis {text}: tiles are not cut; leave it out, or use --mode exact")
    if text in ("auto", "height", "width"):
        return text
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if match is None:
        raise InputError(f"--axis {text}: give auto, height, width, or rows and columns such as 2x4")
    return int(match[1]), int(match[2])
