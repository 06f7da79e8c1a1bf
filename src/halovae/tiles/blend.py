"""The VAE's own `blend_*` methods, as one expression where diffusers loops over rows.

The arithmetic is the loop's, in the same order and the same precision, so the bits are the same. That is not taken on
trust: the first blend of each kind runs both ways, and where they differ the VAE's own method goes on being used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halovae.base.replaced import replaced

DIMS = {"blend_t": -3, "blend_v": -2, "blend_h": -1}
"""Names of the methods, and the dimension each one blends along."""

Blend = Callable[[Tensor, Tensor, int], Tensor]


class Blends:
    """Fast blending for one VAE, and what is known about it.

    Args:
        vae: the VAE; those of its methods that have the known names are replaced within `fast` and `skipped`, for
            the thread that is in there.
    """

    def __init__(self, vae: nn.Module) -> None:
        self._vae = vae
        self._own: dict[str, Blend] = {name: getattr(vae, name) for name in DIMS if hasattr(vae, name)}
        self._same: dict[tuple[Any, ...], bool] = {}

    @contextmanager
    def fast(self) -> Iterator[None]:
        """Within it, the VAE blends in one expression."""
        with self._replaced({name: self._checked(name, own) for name, own in self._own.items()}):
            yield

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Within it, the VAE doesn't blend: its tiles are stand-ins."""
        with self._replaced({name: lambda above, tile, extent: tile for name in self._own}):
            yield

    @contextmanager
    def _replaced(self, blends: dict[str, Blend]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, blend in blends.items():
                stack.enter_context(replaced(self._vae, name, blend, here=True))
            yield

    def _checked(self, name: str, own: Blend) -> Blend:
        def blend(above: Tensor, tile: Tensor, extent: int) -> Tensor:
            key = (name, tile.ndim, tile.dtype, tile.device.type)
            if self._same.get(key) or tile.is_meta:  # shapes alone have no bits
                return blend_rows(above, tile, extent, DIMS[name])
            if self._same.get(key) is None and min(above.shape[DIMS[name]], tile.shape[DIMS[name]], extent) > 2:
                mine = blend_rows(above, tile.clone(), extent, DIMS[name])
                blended = own(above, tile, extent)
                self._same[key] = torch.equal(mine, blended)
                return blended
            return own(above, tile, extent)  # too few rows to tell, or known to be another arithmetic

        return blend


def blend_rows(above: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """Fade from the end of `above` into the beginning of `tile`, in place.

    Args:
        above: the tile before it along `dim`.
        tile: changed and returned.
        extent: rows (columns, frames) to fade over, at most.
        dim: negative dimension.
    """
    extent = min(above.shape[dim], tile.shape[dim], extent)
    if extent <= 0:
        return tile
    # A Python number times a half-precision tensor is computed in float32 and rounded once; so is this.
    wide = torch.float64 if tile.dtype == torch.float64 else torch.float32
    steps = torch.arange(extent, dtype=torch.float64, device="cpu") / extent
    shape = [extent] + [1] * (-dim - 1)
    fade_in = steps.to(wide).view(shape).to(tile.device, non_blocking=True)
    fade_out = (1 - steps).to(wide).view(shape).to(tile.device, non_blocking=True)
    start = tile.narrow(dim, 0, extent)
    end = above.narrow(dim, above.shape[dim] - extent, extent)
    start.copy_((end * fade_out).to(tile.dtype) + (start * fade_in).to(tile.dtype))
    return tile
