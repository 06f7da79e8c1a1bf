"""Sliding windows: convolution, padding, pooling, resampling. They see beyond a pixel, so they fetch halos."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.geometry import (
    Cut,
    Extent,
    Window,
    coarsen,
    divides,
    narrowest,
    padded,
    refine,
    transposed_window,
    window,
)
from halovae.exact.halo import ZEROS, Fill, extend, own, recut
from halovae.exact.layout import (
    Layout,
    each,
    global_length,
    is_sharded,
    mark,
    plain,
    require_axis,
    require_layout,
    require_rows,
    with_lengths,
)
from halovae.exact.mesh import Mesh
from halovae.exact.shard_mode import rule
from halovae.kernels.lazy import upsampled

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
TRANSPOSED = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
AVERAGES = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
MAXIMA = {F.max_pool1d: 1, F.max_pool2d: 2, F.max_pool3d: 3}


@rule(*CONVOLUTIONS)
def convolution(
    mesh: Mesh, func: Any, tensor: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    layout = require_layout(tensor, weight, bias)
    n = CONVOLUTIONS[func]
    if isinstance(padding, str):
        padding = _named_padding(padding, weight.shape[2:], each(dilation, n))
    steps, pads, gaps = (each(value, n) for value in (stride, padding, dilation))
    if n == 2 and groups == 1 and (recipe := upsampled.foldable(tensor, weight, steps, pads, gaps)):
        return upsampled_convolution(mesh, recipe, layout, weight, bias)
    windows = _windows(layout, tuple(zip(weight.shape[2:], steps, pads, gaps, strict=True)))
    tensor = extend(mesh, tensor, layout, _needs(windows), later=True)
    result = func(tensor, weight, bias, stride, _left(pads, layout, windows), dilation, groups)
    return mark(result, _window_layout(mesh, layout, windows, result))


@lru_cache(maxsize=4096)
def _windows(layout: Layout, geometry: tuple[tuple[int, int, int, int], ...]) -> dict[int, Window]:
    """Of the sharded dimensions, by kernel, stride, padding and dilation of each dimension of the convolution."""
    cuts = _spatial_cuts(layout, len(geometry), [g == (1, 1, 0, 1) for g in geometry])
    return {dim: window(cut, *geometry[dim - layout.ndim]) for dim, cut in cuts.items()}


@rule(*TRANSPOSED)
def transposed_convolution(
    mesh: Mesh, func: Any, tensor: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    layout = require_layout(tensor, weight, bias)
    n = TRANSPOSED[func]
    steps, pads, extras, dilations = (each(v, n) for v in (stride, padding, output_padding, dilation))
    geometry = list(zip(weight.shape[2:], steps, pads, dilations, extras, strict=True))
    cuts = _spatial_cuts(layout, n, [g == (1, 1, 0, 1, 0) for g in geometry])
    windows = {dim: transposed_window(cut, *geometry[dim - layout.ndim]) for dim, cut in cuts.items()}
    tensor = extend(mesh, tensor, layout, _needs(windows))
    crops: dict[int, Extent] = {}
    for dim, w in windows.items():
        # With the halo in place, the shard is transposed unpadded and cropped to the positions it owns.
        part, place = mesh.part(require_axis(layout, dim).axis), dim - layout.ndim
        low, high = w.out.owned(part)
        start = w.needs[part][0] * steps[place] - pads[place]
        reached = (tensor.shape[dim] - 1) * steps[place] + dilations[place] * (weight.shape[place] - 1) + 1
        crops[dim] = (low - start, high - low)
        pads[place], extras[place] = 0, max(0, high - start - reached)
    result = func(tensor, weight, bias, stride, pads, extras, groups, dilation)
    for dim, crop in crops.items():
        result = result.narrow(dim, *crop)
    return mark(result, _window_layout(mesh, layout, windows, result))


@rule(F.pad)
def pad(
    mesh: Mesh, func: Any, tensor: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    layout = require_layout(tensor)
    amounts = {layout.ndim - 1 - i // 2: (pad[i], pad[i + 1]) for i in range(0, len(pad), 2)}
    sharded = {dim: amount for dim, amount in amounts.items() if is_sharded(layout.dims[dim]) and amount != (0, 0)}
    if not sharded:
        result = func(tensor, pad, mode, value)
        return mark(result, with_lengths(layout, result))
    if any(amount < 0 for pair in amounts.values() for amount in pair):
        raise NotExactError("a negative padding of a sharded dimension")
    if mode == "circular":
        raise NotExactError("circular padding of a sharded dimension")
    tensor, layout = own(mesh, tensor, layout)
    windows = {dim: padded(require_axis(layout, dim).cut, *amount) for dim, amount in sharded.items()}
    if mode == "reflect" and not all(_reflects(require_axis(layout, dim).cut, w) for dim, w in windows.items()):
        raise NotExactError(f"reflect padding of {list(sharded.values())} rows on the smallest shard")
    local = {dim: amount for dim, amount in amounts.items() if dim not in sharded}
    needs = {dim: w.needs for dim, w in windows.items()}
    result = extend(mesh, tensor, layout, needs, local, Fill(mode, value or 0.0), later=True)
    for dim, w in windows.items():
        layout = recut(mesh, layout, dim, w.out)
    return mark(result, with_lengths(layout, result))


def _reflects(cut: Cut, window: Window) -> bool:
    """Whether every part has the rows to be mirrored; decided for all parts, so that all ranks refuse together."""
    needs = ((low, high, min(high, cut.size) - max(low, 0)) for low, high in window.needs)
    return all(inside > max(-low, high - cut.size) for low, high, inside in needs)


@rule(*AVERAGES, *MAXIMA)
def pool(
    mesh: Mesh,
    func: Any,
    tensor: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    *more: Any,
    **named: Any,
) -> Tensor:
    """Where the padding has been fetched or filled in, it is no longer left to the function."""
    layout, is_average = require_layout(tensor), func in AVERAGES
    n = AVERAGES[func] if is_average else MAXIMA[func]
    names = ("ceil_mode", "count_include_pad", "divisor_override") if is_average else _OF_MAXIMA
    named |= zip(names, more, strict=False)
    if named.pop("return_indices", False):
        raise NotExactError("positions in a shard are not positions in the picture")
    ceil_mode, counts_all = named.get("ceil_mode", False), named.get("count_include_pad", True)
    if is_average and any(each(padding, n)) and (not counts_all or ceil_mode):
        raise NotExactError("an average that leaves out the padding")
    kernels, pads = each(kernel_size, n), each(padding, n)
    geometry = list(zip(kernels, each(stride or kernel_size, n), pads, each(named.get("dilation", 1), n), strict=True))
    cuts = _spatial_cuts(layout, n, [g[:3] == (1, 1, 0) for g in geometry])
    windows = {dim: window(cut, *geometry[dim - layout.ndim], ceil_mode) for dim, cut in cuts.items()}
    fill = ZEROS if is_average else Fill(value=float("-inf"))
    tensor = extend(mesh, tensor, layout, _needs(windows), fill=fill)
    result = func(tensor, kernel_size, stride, _left(pads, layout, windows), **named)
    return mark(result, _window_layout(mesh, layout, windows, result))


_OF_MAXIMA = ("dilation", "ceil_mode", "return_indices")


def _left(pads: Sequence[int], layout: Layout, windows: dict[int, Window]) -> list[int]:
    """The padding that is left to the function: of dimensions for which nothing was fetched."""
    return [0 if i - len(pads) + layout.ndim in windows else p for i, p in enumerate(pads)]


def _named_padding(name: str, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    if name == "same" and any(k % 2 == 0 for k in kernel):
        raise NotExactError("padding='same' with an even kernel")
    return [d * (k - 1) // 2 if name == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]


def _spatial_cuts(layout: Layout, n: int, trivial: Sequence[bool]) -> dict[int, Cut]:
    """The cuts of the sharded dimensions among the last n, but for those over which the window is one position."""
    if is_sharded(layout.dims[-n - 1]):
        raise NotExactError("the channels are sharded")
    first = layout.ndim - n
    dims = [first + i for i in range(n) if is_sharded(layout.dims[first + i]) and not trivial[i]]
    return {dim: require_axis(layout, dim).cut for dim in dims}


def _needs(windows: dict[int, Window]) -> dict[int, tuple[Extent, ...]]:
    """What to fetch; refused before anything is sent where a part of the output would be too thin."""
    for w in windows.values():
        require_rows(narrowest(w.out))
    return {dim: w.needs for dim, w in windows.items()}


def _window_layout(mesh: Mesh, layout: Layout, windows: dict[int, Window], result: Tensor) -> Layout:
    for dim, w in windows.items():
        layout = recut(mesh, layout, dim, w.out)
    return with_lengths(layout, result)


# ---- resampling -----------------------------------------------------------------------------------------------------


@rule(F.interpolate)
def interpolate(
    mesh: Mesh, func: Any, tensor: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: bool | None = None, recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> Tensor:  # fmt: skip
    """Nearest by whole factors is local; linear modes need one row on each side, cropped afterwards."""
    options = (mode, align_corners, recompute_scale_factor, antialias)
    layout = require_layout(tensor)
    tensor, layout = own(mesh, tensor, layout)
    n = layout.ndim - 2
    wholes = [global_length(dim) for dim in layout.dims[2:]]
    targets = [int(target) for target in each(size, n)] if size is not None else [
        int(length * factor) for length, factor in zip(wholes, each(scale_factor, n), strict=True)
    ]  # fmt: skip
    resized = layout
    for dim, (length, target) in enumerate(zip(wholes, targets, strict=True), start=2):
        resized = resized.replace(dim, plain(target)) if not is_sharded(layout.dims[dim]) else recut(
            mesh, resized, dim, _resampled(require_axis(layout, dim).cut, length, target, mode)
        )  # fmt: skip
    if mode in ("nearest", "nearest-exact"):
        local = resized.shape[2:] if size is not None else None
        return mark(func(tensor, local, scale_factor, *options), resized)
    if mode not in ("linear", "bilinear", "trilinear") or align_corners or antialias:
        raise NotExactError(f"resampling in mode {mode!r} looks at more than neighbours")
    if any(target % length for length, target in zip(wholes, targets, strict=True)):
        raise NotExactError("linear resampling by a factor that is not whole")
    factors = [target // length for length, target in zip(wholes, targets, strict=True)]
    return mark(_linear(mesh, func, tensor, layout, factors, options), resized)


def _one_more(layout: Layout) -> dict[int, tuple[Extent, ...]]:
    """A row on each side of what each part has."""
    dims = [dim for dim in layout.sharded_dims if dim >= 2]
    return {dim: tuple((low - 1, high + 1) for low, high in require_axis(layout, dim).cut.extents) for dim in dims}


def _resampled(cut: Cut, length: int, target: int, mode: str) -> Cut:
    if target % length == 0:
        return refine(cut, target // length)
    if length % target == 0 and mode == "nearest" and divides(cut, length // target):
        return coarsen(cut, length // target)
    raise NotExactError(f"resampling {length} rows to {target} is not by a whole factor")


def _linear(mesh: Mesh, func: Any, tensor: Tensor, layout: Layout, factors: list[int], options: Any) -> Tensor:
    needs = _one_more(layout)
    wide = extend(mesh, tensor, layout, needs, fill=Fill("replicate"))
    result = func(wide, [f * s for f, s in zip(factors, wide.shape[2:], strict=True)], None, *options)
    for dim in needs:
        result = result.narrow(dim, factors[dim - 2], factors[dim - 2] * tensor.shape[dim])
    return result


def upsampled_convolution(
    mesh: Mesh, recipe: upsampled.Upsampled, layout: Layout, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Where the upsampling has not been done yet, the halo is a row of the small picture."""
    small = with_lengths(layout, recipe.base)
    for dim in layout.sharded_dims:
        small = recut(mesh, small, dim, coarsen(require_axis(layout, dim).cut, 2))
    needs = _one_more(small)
    wide = extend(mesh, recipe.base, small, needs, later=True)
    result = upsampled.upsampled_convolution(recipe, weight, bias, wide, tuple(needs))
    return mark(result, with_lengths(layout, result))
