"""`--mode` and its companions: exact shards, the VAE's own tiles, or what is faster."""

from __future__ import annotations

from typing import Annotated

import typer

from halovae.cli import usage

WORDS = "exact|tile|auto"
HELP = (
    "exact cuts the picture into shards that exchange borders: the un-tiled result. tile spreads the VAE's own tiles "
    "over the ranks. auto is exact, and tiles where that is refused or memory is short."
)
UNTILED_HELP = "Give the un-tiled result (exact mode) of a VAE that comes tiled, too."
DEFAULT = "exact; tile for a VAE that comes tiled"
TILING_HELP = "The same as {}, by the name that vLLM-Omni has for it."
SIZE_HELP = "Use this many of the ranks for the VAE; the others wait, and share its result."
"""Of the same flags, also where they are called `--vae-mode`."""
Mode = Annotated[str | None, typer.Option(metavar=WORDS, help=HELP, show_default=DEFAULT, rich_help_panel=usage.VAE)]
Untiled = Annotated[bool, typer.Option("--untiled", help=UNTILED_HELP, rich_help_panel=usage.VAE)]
TileSize = Annotated[
    str | None,
    typer.Option(
        metavar="H,W", help="Make tiles this high and wide, in pixels.", show_default="the VAE's own",
        rich_help_panel=usage.VAE,
    ),
]  # fmt: skip
TileOverlap = Annotated[
    str | None,
    typer.Option(
        metavar="H,W", help="Let tiles overlap by so many pixels.", show_default="the VAE's own",
        rich_help_panel=usage.VAE,
    ),
]  # fmt: skip
UseTiling = Annotated[
    bool,
    typer.Option(
        "--vae-use-tiling", "--vae_use_tiling", help=TILING_HELP.format("--mode tile"), rich_help_panel=usage.VAE
    ),
]
PatchParallelSize = Annotated[
    int | None,
    typer.Option(
        "--vae-patch-parallel-size",
        "--vae_patch_parallel_size",
        min=1,
        metavar="N",
        help=SIZE_HELP,
        show_default="all",
        rich_help_panel=usage.VAE,
    ),
]
