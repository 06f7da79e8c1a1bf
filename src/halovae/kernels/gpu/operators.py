"""Triton's kernels as operators of torch, for runs on shapes alone: what is no operator would take no time there.

On a device kernels are launched without them, since the host takes longer to go through torch's dispatcher. They run
there only to be timed, for which `torch.library.custom_op` would load the compiler of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("halovae", "DEF")


def _operator(schema: str, shape: Callable[..., Any] = lambda *_, **__: None) -> Callable[[Callable[..., Any]], Any]:
    """Makes an operator of what launches a kernel; `shape` gives its result on shapes alone."""

    def define(launch: Callable[..., Any]) -> Any:
        name = _LIBRARY.define(schema)
        _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, shape, "Meta")
        return getattr(torch.ops.halovae, name)

    return define


@_operator(
    "gpu_chain(Tensor positions, Tensor(a!) out, *, Tensor? shift=None, Tensor? other=None, float? normalize=None, "
    "bool mean=False, Tensor? times=None, Tensor? plus=None, Tensor? by=None, Tensor? more=None, int[]? spread=None, "
    "bool silu=False) -> ()"
)
def _chain(positions: Tensor, out: Tensor, **form: Any) -> None:
    from halovae.kernels.gpu import triton_chain

    triton_chain.run(positions, out, **form)


def chain(positions: Tensor, out: Tensor, **form: Any) -> None:
    """As `triton_chain.run`. Numbers that may be tensors are left out: they take no time."""
    tensors = {name: form[name] for name in ("shift", "times", "plus") if isinstance(form.get(name), Tensor)}
    _chain(positions, out, **{**form, "shift": None, "times": None, "plus": None, **tensors})


@_operator(
    "gpu_convolution(Tensor pictures, Tensor packed, Tensor? bias, int[] kernel, int stride, int[] before, "
    "Tensor(a!) out, int upsample=1) -> ()"
)
def convolve(
    pictures: Tensor, packed: Tensor, bias: Tensor | None, kernel: list[int], stride: int, before: list[int],
    out: Tensor, upsample: int = 1,
) -> None:  # fmt: skip
    """As `triton_convolution.convolve`, of pictures `[T, C, H, W]` instead of frames `[T, H, W, C]`."""
    from halovae.kernels.gpu import triton_convolution

    tile = triton_convolution.tile_for(pictures.shape[1], out.shape[1])
    triton_convolution.convolve(
        pictures.movedim(1, -1), packed, bias, tile, kernel=kernel, stride=stride, before=(before[0], before[1]),
        out=out.movedim(1, -1), upsample=upsample,
    )  # fmt: skip


@_operator("gpu_copy(Tensor pictures, Tensor(a!) out) -> ()")
def copy(pictures: Tensor, out: Tensor) -> None:
    """As `triton_copy.run`, likewise."""
    from halovae.kernels.gpu import triton_copy

    triton_copy.run(pictures.movedim(1, -1), out.movedim(1, -1))


def _of_norms(name: str, schema: str, shape: Callable[..., Any]) -> Callable[..., Tensor]:
    """A function of `triton_norms`: by the operator on shapes, else by itself."""

    def launch(*args: Any) -> Tensor:
        from halovae.kernels.gpu import triton_norms

        return getattr(triton_norms, name)(*args)

    operator = _operator(schema, shape)(launch)
    return lambda tensor, *more: (operator if tensor.is_meta else launch)(tensor, *more)


def _shape_of_moments(positions: Tensor, groups: int, shift: Tensor | None) -> Tensor:
    from halovae.kernels.gpu import triton_norms

    return positions.new_empty(triton_norms.cut(positions.shape, groups).shape, dtype=torch.float32)


moments = _of_norms(
    "moments", "gpu_moments(Tensor positions, int groups, Tensor? shift) -> Tensor", _shape_of_moments
)  # fmt: skip
merged = _of_norms(
    "merged", "gpu_merged_moments(Tensor parts, int groups) -> Tensor",
    lambda parts, groups: parts.new_empty(3, parts.shape[2], groups),
)  # fmt: skip
affine = _of_norms(
    "affine",
    "gpu_affine(Tensor parts, int groups, int channels, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    lambda parts, groups, channels, *_: parts.new_empty(2, parts.shape[2], channels),
)
