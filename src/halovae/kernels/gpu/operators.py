"""Triton's kernels as operators of torch, for runs on shapes alone: what is no operator would take no time there.

On a device kernels are launched without them, since the host takes longer to go through torch's dispatcher. They run
there only to be timed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("halovae", "DEF")
_LIBRARY.define(
    "gpu_chain(Tensor positions, Tensor(a!) out, Tensor? shift, Tensor? other, float? normalize, bool mean, "
    "Tensor? times, Tensor? plus, Tensor? by, Tensor? more, int[]? spread, bool silu) -> ()"
)
_LIBRARY.define(
    "gpu_convolution(Tensor pictures, Tensor packed, Tensor? bias, int[] kernel, int stride, int[] before, "
    "Tensor(a!) out, int upsample) -> ()"
)
_LIBRARY.define("gpu_copy(Tensor pictures, Tensor(a!) out) -> ()")
_LIBRARY.define("gpu_moments(Tensor positions, int groups, Tensor? shift) -> Tensor")
_LIBRARY.define("gpu_merged_moments(Tensor parts, int groups) -> Tensor")
_LIBRARY.define("gpu_affine(Tensor parts, int groups, int channels, Tensor? weight, Tensor? bias, float eps) -> Tensor")


def chain(
    positions: Tensor, out: Tensor, *, shift: object = None, other: Tensor | None = None,
    normalize: float | None = None, mean: bool = False, times: object = None, plus: object = None,
    by: Tensor | None = None, more: Tensor | None = None, spread: Sequence[int] | None = None, silu: bool = False,
) -> None:  # fmt: skip
    """As `gpu_chain.run`. Numbers are left out: they take no time."""
    shift, times, plus = (value if isinstance(value, Tensor) else None for value in (shift, times, plus))
    torch.ops.halovae.gpu_chain(positions, out, shift, other, normalize, mean, times, plus, by, more, spread, silu)


def convolve(
    pictures: Tensor, packed: Tensor, bias: Tensor | None, *, kernel: Sequence[int], stride: int,
    before: Sequence[int], out: Tensor, upsample: int = 1,
) -> None:  # fmt: skip
    """As `gpu_convolution.convolve`, of pictures `[T, C, H, W]` instead of frames `[T, H, W, C]`."""
    torch.ops.halovae.gpu_convolution(pictures, packed, bias, kernel, stride, before, out, upsample)


def copy(pictures: Tensor, out: Tensor) -> None:
    """As `gpu_copy.run`, likewise."""
    torch.ops.halovae.gpu_copy(pictures, out)


def moments(positions: Tensor, groups: int, shift: Tensor | None) -> Tensor:
    """As `gpu_norms.moments`."""
    return torch.ops.halovae.gpu_moments(positions, groups, shift)


def merged(parts: Tensor, groups: int) -> Tensor:
    """As `gpu_norms.merged`."""
    return torch.ops.halovae.gpu_merged_moments(parts, groups)


def affine(
    parts: Tensor, groups: int, channels: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    """As `gpu_norms.affine`."""
    return torch.ops.halovae.gpu_affine(parts, groups, channels, weight, bias, eps)


def _launch_chain(
    positions: Tensor, out: Tensor, shift: Tensor | None, other: Tensor | None, normalize: float | None,
    mean: bool, times: Tensor | None, plus: Tensor | None, by: Tensor | None, more: Tensor | None,
    spread: list[int] | None, silu: bool,
) -> None:  # fmt: skip
    from halovae.kernels.gpu import triton_chain

    triton_chain.run(
        positions, out, shift=shift, other=other, normalize=normalize, mean=mean, times=times, plus=plus, by=by,
        more=more, spread=spread, silu=silu,
    )  # fmt: skip


def _launch_convolution(
    pictures: Tensor, packed: Tensor, bias: Tensor | None, kernel: list[int], stride: int, before: list[int],
    out: Tensor, upsample: int,
) -> None:  # fmt: skip
    from halovae.kernels.gpu import triton_convolution

    tile = triton_convolution.tile_for(pictures.shape[1], out.shape[1])
    triton_convolution.convolve(
        pictures.movedim(1, -1), packed, bias, tile, kernel=kernel, stride=stride, before=(before[0], before[1]),
        out=out.movedim(1, -1), upsample=upsample,
    )  # fmt: skip


def _launch_copy(pictures: Tensor, out: Tensor) -> None:
    from halovae.kernels.gpu import triton_copy

    triton_copy.run(pictures.movedim(1, -1), out.movedim(1, -1))


def _launch_moments(positions: Tensor, groups: int, shift: Tensor | None) -> Tensor:
    from halovae.kernels.gpu import triton_norms

    return triton_norms.moments(positions, groups, shift)


def _launch_merged(parts: Tensor, groups: int) -> Tensor:
    from halovae.kernels.gpu import triton_norms

    return triton_norms.merged(parts, groups)


def _launch_affine(
    parts: Tensor, groups: int, channels: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    from halovae.kernels.gpu import triton_norms

    return triton_norms.affine(parts, groups, channels, weight, bias, eps)


def _shape_of_moments(positions: Tensor, groups: int, shift: Tensor | None) -> Tensor:
    from halovae.kernels.gpu import triton_norms

    return positions.new_empty(triton_norms.cut(positions.shape, groups).shape, dtype=torch.float32)


def _shape_of_merged(parts: Tensor, groups: int) -> Tensor:
    return parts.new_empty(3, parts.shape[2], groups)


def _shape_of_affine(parts: Tensor, groups: int, channels: int, *_: object) -> Tensor:
    return parts.new_empty(2, parts.shape[2], channels)


for _name, _launch in {
    "gpu_chain": _launch_chain, "gpu_convolution": _launch_convolution, "gpu_copy": _launch_copy,
}.items():  # fmt: skip
    _LIBRARY.impl(_name, _launch, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, lambda *_: None, "Meta")
for _name, _launch, _shape in (
    ("gpu_moments", _launch_moments, _shape_of_moments), ("gpu_merged_moments", _launch_merged, _shape_of_merged),
    ("gpu_affine", _launch_affine, _shape_of_affine),
):  # fmt: skip
    _LIBRARY.impl(_name, _launch, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _shape, "Meta")
