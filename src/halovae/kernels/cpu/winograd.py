"""3 x 3 convolution with 16 products for four results instead of 36, after Winograd; further taps in time are added up.

Every 4 x 4 square of the input, taken every two rows and columns, becomes 16 sums, every kernel too; their products,
summed over channels (and taps in time), become 2 x 2 results. The factors are 1 and 1/2, so float32 rounds no worse
than a plain sum of 36. Lavin and Gray, "Fast algorithms for convolutional neural networks", 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.kernels.cpu import packed
from halovae.kernels.memory_format import memory_format
from halovae.kernels.trials import Way, gain

WORKSPACE_BYTES = 1 << 23
"""Bytes of the sums of a piece, per thread: more falls out of the cache, less leaves small matrix products."""
MANY_POSITIONS = 1 << 11
"""For fewer results than that the kernel's sums take longer than they save."""
LIKE_MORE = 128
"""Channels from which on more channels only gain more."""
CLEARLY = 1.1
"""A trial is smaller than a picture, and in the cache: it has to be faster by this factor."""


def fits(weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether a convolution can be done this way."""
    return tuple(weight.shape[-2:]) == (3, 3) and max(*stride, *dilation) == 1


def pays(weight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a convolution with a result of this shape is faster this way, on this processor."""
    out_channels, channels, *taps, _, _ = weight.shape
    if dtype != torch.float32 or shape[0] * prod(shape[2:]) < MANY_POSITIONS:
        return False
    sizes = (min(channels, LIKE_MORE), min(out_channels, LIKE_MORE), *taps)
    return gain(("Winograd", sizes), lambda: _ways(*sizes)) > CLEARLY


def at_once(shape: Sequence[int], dim: int, out_channels: int) -> int:
    """How many rows or columns (`dim`) of a picture of this shape fit the workspace; even."""
    line = 4 * 4 * (shape[1] + out_channels)  # a quarter of 16 sums for each position, of four bytes each
    line *= prod((*shape[2:dim], *shape[dim + 1 :]))
    return max(4, WORKSPACE_BYTES * torch.get_num_threads() // line // 2 * 2)


def sums_of(weight: Tensor) -> Tensor:
    """`[16, T, C, C']` from the kernel `[C', C, (T,) 3, 3]`."""
    out_channels, channels = weight.shape[:2]
    line = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    taps = weight.reshape(out_channels, -1).t().contiguous().view(channels, -1, 9, out_channels)
    sums = torch.kron(line, line) @ taps.permute(2, 1, 0, 3).reshape(9, -1)
    return sums.view(16, -1, channels, out_channels)


def convolve(source: Tensor, sums: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the convolution of `[B, C, (T,) H, W]`, which is padded already, into `out`.

    Args:
        source: channels last.
        sums: of the kernel, from `sums_of`.
        bias: `[C']`.
        out: `[B, C', (T',) H - 2, W - 2]`, of any dtype.
    """
    if source.shape[-1] % 2 or source.shape[-2] % 2:
        source = F.pad(source, (0, source.shape[-1] % 2, 0, source.shape[-2] % 2))
    for frames, result in zip(_frames(source), _frames(out), strict=True):
        products = _products(_sums(frames), sums)
        if bias is not None:
            products[1, 1].add_(bias)  # It is in all four results, with the factor 1.
        _add_up(products, 0)
        _add_up(products[:2], 1)
        for row in (0, 1):
            for column in (0, 1):
                target = result[:, row::2, column::2]
                target.copy_(products[row, column, :, : target.shape[1], : target.shape[2]])


def _frames(tensor: Tensor) -> Sequence[Tensor]:
    """Groups of `[T, H, W, C]` that taps in time join; pictures are one group."""
    tensor = tensor.movedim(1, -1)
    return tensor.unbind(0) if tensor.ndim == 5 else (tensor,)


def _sums(frames: Tensor) -> Tensor:
    """`[4, 4, T, P, Q, C]` from P x Q squares of `[T, 2 P + 2, 2 Q + 2, C]`."""
    count, height, width, channels = frames.shape
    p, q = height // 2 - 1, width // 2 - 1
    by_rows, sums = frames.new_empty(4, count, p, width, channels), frames.new_empty(4, 4, count, p, q, channels)
    _split([frames[:, i : i + 2 * p - 1 : 2] for i in range(4)], by_rows)
    _split([by_rows[:, :, :, i : i + 2 * q - 1 : 2] for i in range(4)], sums.transpose(0, 1))
    return sums


def _split(lines: Sequence[Tensor], out: Tensor) -> None:
    first, second, third, fourth = lines
    torch.sub(first, third, out=out[0])
    torch.add(second, third, out=out[1])
    torch.sub(third, second, out=out[2])
    torch.sub(fourth, second, out=out[3])


def _products(sums: Tensor, kernel: Tensor) -> Tensor:
    """`[4, 4, T', P, Q, C']`, summed over channels and taps."""
    _, _, count, p, q, channels = sums.shape
    _, taps, _, out_channels = kernel.shape
    count -= taps - 1
    out = sums.new_empty(16, count * p * q, out_channels)
    for tap in range(taps):
        one = sums[:, :, tap : tap + count].reshape(16, -1, channels)
        torch.baddbmm(out, one, kernel[:, tap], beta=min(tap, 1), out=out)
    return out.view(4, 4, count, p, q, out_channels)


def _add_up(products: Tensor, dim: int) -> None:
    """Four lines become the first two, in place."""
    first, second, third, fourth = products.unbind(dim)
    first.add_(second).add_(third)
    second.sub_(third).add_(fourth)


def _ways(channels: int, out_channels: int, *taps: int) -> tuple[Way, Way]:
    """A convolution by the library and this way, of a small picture."""
    n = 2 + len(taps)
    ones, zeros, last = [1] * n, [0] * n, memory_format(n + 2, True)
    picture = torch.ones(1, channels, *taps, 34, 34).to(memory_format=last)
    weight = torch.ones(out_channels, channels, *taps, 3, 3).to(memory_format=last)
    geometry = packed.Geometry(
        tuple(weight.shape), weight.dtype, tuple(picture.shape), tuple(ones), tuple(zeros), tuple(ones)
    )
    ordered = packed.prepared(weight, "trial", lambda: weight, geometry, {})
    sums, out = sums_of(weight), torch.ones(1, out_channels, *ones[2:], 32, 32).to(memory_format=last)
    return (
        lambda: packed.convolve(picture, ordered, None, ones, zeros, ones),
        lambda: convolve(picture, sums, None, out),
    )
