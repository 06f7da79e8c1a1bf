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
    "gpu_chain(Tensor positions, Tensor(a!) out, Tensor? shift, Tensor? other, float? normalize, Tensor? times, "
    "Tensor? plus, bool silu) -> ()"
)
_LIBRARY.define(
    "gpu_convolution(Tensor pictures, Tensor packed, Tensor? bias, int[] kernel, int stride, int[] before, "
    "Tensor(a!) out, int upsample) -> ()"
)
_LIBRARY.define("gpu_copy(Tensor pictures, Tensor(a!) out) -> ()")


def chain(
    positions: Tensor, out: Tensor, *, shift: object = None, other: Tensor | None = None,
    normalize: float | None = None, times: object = None, plus: object = None, silu: bool = False,
) -> None:  # fmt: skip
    """As `gpu_chain.run`. Numbers are left out: they take no time."""
    shift, times, plus = (value if isinstance(value, Tensor) else None for value in (shift, times, plus))
    torch.ops.halovae.gpu_chain(positions, out, shift, other, normalize, times, plus, silu)


def convolve(
    pictures: Tensor, packed: Tensor, bias: Tensor | None, *, kernel: Sequence[int], stride: int,
    before: Sequence[int], out: Tensor, upsample: int = 1,
) -> None:  # fmt: skip
    """As `gpu_convolution.convolve`, of pictures `[T, C, H, W]` instead of frames `[T, H, W, C]`."""
    torch.ops.halovae.gpu_convolution(pictures, packed, bias, kernel, stride, before, out, upsample)


def copy(pictures: Tensor, out: Tensor) -> None:
    """As `gpu_copy.run`, likewise."""
    torch.ops.halovae.gpu_copy(pictures, out)


def _launch_chain(
    positions: Tensor, out: Tensor, shift: Tensor | None, other: Tensor | None, normalize: float | None,
    times: Tensor | None, plus: Tensor | None, silu: bool,
) -> None:  # fmt: skip
    from halovae.kernels import gpu_chain

    gpu_chain.run(positions, out, shift=shift, other=other, normalize=normalize, times=times, plus=plus, silu=silu)


def _launch_convolution(
    pictures: Tensor, packed: Tensor, bias: Tensor | None, kernel: list[int], stride: int, before: list[int],
    out: Tensor, upsample: int,
) -> None:  # fmt: skip
    from halovae.kernels import gpu_convolution

    tile = gpu_convolution.tile_for(pictures.shape[1], out.shape[1])
    gpu_convolution.convolve(
        pictures.movedim(1, -1), packed, bias, tile, kernel=kernel, stride=stride, before=(before[0], before[1]),
        out=out.movedim(1, -1), upsample=upsample,
    )  # fmt: skip


def _launch_copy(pictures: Tensor, out: Tensor) -> None:
    from halovae.kernels import gpu_copy

    gpu_copy.run(pictures.movedim(1, -1), out.movedim(1, -1))


for _name, _launch in {
    "gpu_chain": _launch_chain, "gpu_convolution": _launch_convolution, "gpu_copy": _launch_copy,
}.items():  # fmt: skip
    _LIBRARY.impl(_name, _launch, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, lambda *_: None, "Meta")
