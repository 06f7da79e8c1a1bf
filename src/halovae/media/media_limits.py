"""How large a picture and a clip may be, and what to say of a broken one."""

from __future__ import annotations

from pathlib import Path

from halovae.base.errors import InputError

MAX_FRAME_PIXELS = 2**26
"""A header that claims more than 8192 x 8192 is taken for broken or hostile."""
MAX_CLIP_BYTES = 8 * 2**30
"""Frames are held in memory as 8-bit RGB; a forgotten `--frames` on a film would take all of it."""


def check_pixels(path: Path, width: int, height: int) -> None:
    """Refuse a size before any memory is taken for it.

    Raises:
        InputError: more pixels than `MAX_FRAME_PIXELS`, or none.
    """
    if width * height > MAX_FRAME_PIXELS:
        raise InputError(
            f"{path} claims {width}x{height} pixels, more than the limit of {MAX_FRAME_PIXELS}: too large, or broken"
        )
    if width < 1 or height < 1:
        raise InputError(f"{path} has a picture of {width}x{height} pixels")


def broken(path: Path, frame: int, why: str) -> str:
    """What to tell of a clip whose frames before `frame` are whole."""
    remedy = f"; the first {frame} can be read: use --frames 0:{frame}" if frame else ""
    return f"{path} is broken at frame {frame} ({why}){remedy}"
