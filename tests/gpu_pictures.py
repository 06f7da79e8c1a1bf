"""Pictures for tests of the kernels of accelerators."""

import torch
from torch import Tensor

# Sums of a few hundred float32 products, added in another order.
TOLERANCE = 1e-4


def frames(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def picture_of(frames: Tensor) -> Tensor:
    """(T, H, W, C) to (1, C, T, H, W)."""
    return frames.permute(3, 0, 1, 2)[None]


def frames_of(picture: Tensor) -> Tensor:
    return picture[0].permute(1, 2, 3, 0)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def video(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return frames(*shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)


def channels_last(tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats.get(tensor.ndim, torch.contiguous_format))
