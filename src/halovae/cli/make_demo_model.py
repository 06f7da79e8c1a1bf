"""`halovae make-demo-model`: a tiny pipeline on disk."""

from __future__ import annotations

from pathlib import Path

import typer

from halovae.cli import flags

_TRY = {
    "image-to-video": '--image PICTURE --prompt "" --height 128 --width 192 --num-frames 17 --num-inference-steps 4',
    "text-to-video": '--prompt "a cup" --height 128 --width 192 --num-frames 17 --num-inference-steps 8',
    "image-to-image": '--image PICTURE --prompt "" --strength 0.3 --height 256 --width 384 --num-inference-steps 8',
}


_SHOWS = {
    "image-to-video": "its videos are the image, standing still, whatever the seed",
    "text-to-video": "its videos are clouds of colour, others for each seed",
    "image-to-image": "its pictures are the image in coarse squares",
}


@flags.takes("make-demo-model")
def make_demo_model(context: typer.Context, *, folder: Path, kind: str) -> int:
    """Build a tiny pipeline in diffusers' format, without any download, to try the other commands."""
    from halovae.app.watch import guarded
    from halovae.base.files import check_new_folder

    check_new_folder(folder)
    with guarded():
        from halovae.base.quiet import all_quiet

        with all_quiet():  # Importing speaks too.
            from halovae.pipelines.demo import make_demo_model as make

            make(folder, kind)
    typer.echo(f"{folder}: {_SHOWS[kind]}; try it with")
    typer.echo(f"  halovae {kind} --model {folder} {_TRY[kind]} --ranks 2")
    return 0
