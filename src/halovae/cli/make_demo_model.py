"""`halovae make-demo-model`: a tiny image-to-video pipeline on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Write here: a folder that is not there yet.", show_default=False)
]


def make_demo_model(folder: _Folder) -> int:
    """Build a tiny image-to-video pipeline in diffusers' format, without any download, to try the other commands."""
    from halovae.files import check_new_folder
    from halovae.watch import guarded

    check_new_folder(folder)
    with guarded():
        from halovae.pipelines.quiet import quiet

        with quiet():  # Importing speaks too.
            from halovae.pipelines.demo import make_demo_model as make

            make(folder)
    typer.echo(f"{folder}: try it with")
    typer.echo(
        f'  halovae image-to-video --model {folder} --image PICTURE --prompt "" --height 128 --width 192 '
        "--num-frames 17 --num-inference-steps 4 --ranks 2"
    )
    return 0
