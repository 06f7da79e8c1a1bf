"""`halovae image-to-video`, `text-to-video` and `image-to-image`: whole pipelines, from a prompt to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from halovae.app.generation import start
from halovae.cli import flags


@flags.takes("image-to-video", output=Path("i2v_output.mp4"))
def image_to_video(context: typer.Context, **given: Any) -> int:
    """Make a video from an image and a prompt, with any image-to-video pipeline of diffusers, on several devices."""
    return start(context, "image-to-video", given)


@flags.takes("text-to-video", output=Path("t2v_output.mp4"))
def text_to_video(context: typer.Context, **given: Any) -> int:
    """Make a video from a prompt, with any text-to-video pipeline of diffusers, on several devices."""
    return start(context, "text-to-video", given)


@flags.takes("image-to-image", output=Path("i2i_output.png"))
def image_to_image(context: typer.Context, **given: Any) -> int:
    """Edit an image after a prompt, with any image-to-image pipeline of diffusers, on several devices."""
    return start(context, "image-to-image", given)
