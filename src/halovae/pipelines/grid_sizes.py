"""Which heights, widths and frame counts a pipeline takes, and how many tokens they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from halovae.base.errors import Faults
from halovae.media.vae_limits import Limits, limits_of
from halovae.pipelines.generation_settings import Generation, Setup, default, parameters
from halovae.pipelines.grid import TokenGrid
from halovae.pipelines.transformers import degree, patch


def grid_of(components: Mapping[str, Any], limits: Limits | None = None) -> TokenGrid:
    """Learn it from the VAE's own code and the denoiser's config. Weights are not touched."""
    limits = limits or limits_of(components["vae"])
    frames, side = patch(components, limits.latent_channels)
    return TokenGrid(
        ratio=limits.ratio, period=limits.period, step=_step(limits), patch_frames=frames, patch_side=side,
        padded_count=None if limits.per_frame else limits.padded_count,
    )  # fmt: skip


def _step(limits: Limits) -> int:
    """See `TokenGrid.step`."""
    if limits.per_frame or limits.padded_count(1) != 1:
        return 0
    step = limits.padded_count(2) - 1
    return step if limits.padded_count(2 + step) == 1 + 2 * step else 0


def fill_in(cls: Any, grid: TokenGrid, generation: Generation, image_size: tuple[int, int] | None) -> Generation:
    """Choose the sizes that were not asked for: the proportions of the image (its height and width, None: there is
    none) at about the pipeline's own number of pixels."""
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


def check_sizes(cls: Any, grid: TokenGrid, generation: Generation, setup: Setup) -> None:
    """Refuse sizes that the pipeline would change or can't spread, with the nearest that it takes."""
    known, faults = parameters(cls), Faults()
    for name in ("height", "width"):
        with faults.noted():
            grid.check_side(f"--{name}", getattr(generation, name))
    frames = generation.num_frames or default(known, "num_frames") or 1
    if "num_frames" in known:
        with faults.noted():
            grid.check_count("--num-frames", frames)
    faults.check()
    if generation.height is not None and generation.width is not None:
        grid.check_tokens(generation.height, generation.width, frames, degree(setup))


def _nearest(size: float, multiple: int) -> int:
    return max(1, round(size / multiple)) * multiple
