"""Which heights, widths and frame counts a pipeline takes, and how many tokens they make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from halovae.base.errors import Faults, InputError
from halovae.media.vae_limits import limits_of
from halovae.pipelines.generation_settings import Generation, Setup
from halovae.pipelines.grid import Grid
from halovae.pipelines.signature import default, parameters
from halovae.pipelines.transformers import degree, patch


def grid_of(components: Mapping[str, Any]) -> Grid:
    """Learn it from the VAE's own code and the denoiser's config. Weights are not touched.

    Args:
        components: of a pipeline, by name.

    Raises:
        InputError: the VAE takes no RGB images or clips.
    """
    limits = limits_of(components["vae"])
    frames, side = patch(components, limits.latent_channels)
    period = 0 if limits.per_frame else limits.padded_count(2) - 1
    return Grid(ratio=limits.ratio, period=period, patch_frames=frames, patch_side=side)


def fill_in(cls: Any, grid: Grid, generation: Generation, image_size: tuple[int, int] | None) -> Generation:
    """Choose the sizes that were not asked for: the image's proportions at about the pipeline's own number of pixels.

    Args:
        cls: of the pipeline.
        grid: of the pipeline.
        generation: what was asked for.
        image_size: height and width of the image, None where there is none.
    """
    known = parameters(cls)
    sizes = [default(known, name) for name in ("height", "width")]
    height, width = generation.height, generation.width
    if height is None and width is None and None in sizes:
        return generation
    tall, wide = image_size or tuple(size or 1 for size in sizes)
    if height is None and width is None:
        scale = math.sqrt((sizes[0] or 1) * (sizes[1] or 1) / (tall * wide))
        height, width = _nearest(tall * scale, grid.multiple), _nearest(wide * scale, grid.multiple)
    elif height is None and width is not None:
        height = _nearest(width * tall / wide, grid.multiple)
    elif width is None and height is not None:
        width = _nearest(height * wide / tall, grid.multiple)
    return replace(generation, height=height, width=width)


def check_sizes(cls: Any, grid: Grid, generation: Generation, setup: Setup) -> None:
    """Refuse sizes that the pipeline would change or can't spread, with the nearest that it takes.

    Raises:
        InputError: says which.
    """
    known, faults = parameters(cls), Faults()
    for name in ("height", "width"):
        with faults.noted():
            grid.check_side(f"--{name}", getattr(generation, name))
    frames = generation.num_frames or default(known, "num_frames") or 1
    if "num_frames" in known:
        with faults.noted():
            grid.check_count("--num-frames", frames)
    faults.check()
    _check_tokens(grid, generation, frames, degree(setup))


def _check_tokens(grid: Grid, generation: Generation, frames: int, parts: int) -> None:
    height, width = generation.height, generation.width
    if parts == 1 or height is None or width is None or grid.tokens(height, width, frames) % parts == 0:
        return
    tokens = grid.tokens(height, width, frames)
    heights = _nearest_that(height, grid.multiple, lambda n: grid.tokens(n, width, frames) % parts == 0)
    widths = _nearest_that(width, grid.multiple, lambda n: grid.tokens(height, n, frames) % parts == 0)
    ways = [f"--{name} {' or '.join(map(str, found))}" for name, found in (("height", heights), ("width", widths))]
    raise InputError(
        f"{width}x{height} and {frames} frames make {tokens} tokens, which {parts} ranks can't share evenly: "
        f"use {', or '.join(ways)}"
    )


def _nearest_that(size: int, step: int, fits: Callable[[int], bool]) -> list[int]:
    """The next smaller and the next larger multiple of `step` that fit; there is always a larger one."""
    smaller = next((n for n in range(size - step, 0, -step) if fits(n)), None)
    larger = next(n for n in itertools.count(size + step, step) if fits(n))
    return [larger] if smaller is None else [smaller, larger]


def _nearest(size: float, multiple: int) -> int:
    return max(1, round(size / multiple)) * multiple
