"""Blending in one expression has the bits of diffusers' loops."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo
from torch import nn

from halovae.tiles.blend import DIMS, Blends, blend_rows

OWNERS = {"blend_t": AutoencoderKLHunyuanVideo, "blend_v": AutoencoderKLHunyuanVideo, "blend_h": AutoencoderKL}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(DIMS))
@pytest.mark.parametrize("extent", [0, 1, 3, 7, 40])
def test_same_bits(name: str, dtype: torch.dtype, extent: int) -> None:
    shape = (1, 3, 9, 20, 30) if OWNERS[name] is AutoencoderKLHunyuanVideo else (2, 3, 20, 30)
    above, tile = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    expected = getattr(OWNERS[name], name)(None, above.clone(), tile.clone(), extent)
    assert torch.equal(blend_rows(above, tile, extent, DIMS[name]), expected)


class Squared(nn.Module):
    """Blends in a way of its own."""

    def blend_v(self, above: torch.Tensor, tile: torch.Tensor, extent: int) -> torch.Tensor:
        for y in range(extent):
            fade = (1 - y / extent) ** 2
            tile[:, :, y] = above[:, :, y - extent] * fade + tile[:, :, y] * (1 - fade)
        return tile


def test_another_arithmetic_is_kept() -> None:
    vae = Squared()
    above, tile = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    expected = Squared().blend_v(above.clone(), tile.clone(), 4)
    with Blends(vae).fast():
        for _ in range(2):
            assert torch.equal(vae.blend_v(above.clone(), tile.clone(), 4), expected)
    assert "blend_v" not in vars(vae)
