"""The VAE's own settings for tiles, whatever they are called: sizes with a stride, with an overlap, or with a factor.

Sizes and overlaps here are in pixels, as (height, width).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from halovae.base.replaced import replaced
from halovae.calls.target import told

_AXES = ("height", "width")


@contextmanager
def applied(vae: nn.Module, settings: Mapping[str, Any]) -> Iterator[None]:
    """Within it, the VAE has these settings; switches for this thread alone, sizes for all."""
    with ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(replaced(vae, name, value, here=isinstance(value, bool)))
        yield


def described(vae: nn.Module) -> str:
    """The VAE's settings as text: where it is equal on two ranks, they cut the same tiles."""
    plain = (bool, int, float, str, tuple, type(None))
    return told(
        {name: value for name, value in vars(vae).items() if not name.startswith("_") and isinstance(value, plain)}
    )


@dataclass(frozen=True)
class TileSettings:
    """Sizes and overlaps of the tiles of a VAE."""

    size: tuple[int, int]
    overlap: tuple[int, int]
    ratio: int
    """Pixels per latent."""

    @classmethod
    def of(cls, vae: nn.Module) -> TileSettings | None:
        """What the VAE's attributes say; None where they go by names that are not known here."""
        sizes = _pair(vae, "tile_sample_min_{}", "tile_sample_min_size")
        latents = _pair(vae, "tile_latent_min_{}", "tile_latent_min_size")
        known: dict[str, Any] = {**dict(getattr(vae, "config", {})), **vae.__dict__}
        ratio: int | None = known.get("spatial_compression_ratio")
        if sizes and latents and not ratio:
            ratio = round(sizes[0] / latents[0])
        if not sizes or not ratio:
            return None
        return cls((int(sizes[0]), int(sizes[1])), _overlaps(vae, sizes), ratio)

    def changes(self, vae: nn.Module) -> dict[str, Any]:
        """The VAE's attributes that bring about these sizes and overlaps."""
        found: dict[str, Any] = {}
        for axis, size, overlap in zip(_AXES, self.size, self.overlap, strict=True):
            values = {
                f"tile_sample_min_{axis}": size,
                "tile_sample_min_size": size,
                f"tile_latent_min_{axis}": size // self.ratio,
                "tile_latent_min_size": size // self.ratio,
                f"tile_sample_stride_{axis}": size - overlap,
                f"tile_overlap_factor_{axis}": overlap / size,
                "tile_overlap_factor": overlap / size,
                f"tile_sample_min_overlap_{axis}": overlap,
            }
            found |= {name: value for name, value in values.items() if name in vae.__dict__}
        return found

    def __str__(self) -> str:
        return "tiles of {} x {} that overlap by {} x {}".format(*self.size, *self.overlap)


def _pair(vae: nn.Module, per_axis: str, shared: str) -> tuple[float, float] | None:
    height, width = (vae.__dict__.get(per_axis.format(axis), vae.__dict__.get(shared)) for axis in _AXES)
    return None if height is None or width is None else (height, width)


def _overlaps(vae: nn.Module, sizes: tuple[float, float]) -> tuple[int, int]:
    overlaps = _pair(vae, "tile_sample_min_overlap_{}", "")
    if strides := _pair(vae, "tile_sample_stride_{}", ""):
        overlaps = sizes[0] - strides[0], sizes[1] - strides[1]
    elif factors := _pair(vae, "tile_overlap_factor_{}", "tile_overlap_factor"):
        overlaps = sizes[0] * factors[0], sizes[1] * factors[1]
    return (round(overlaps[0]), round(overlaps[1])) if overlaps else (0, 0)
