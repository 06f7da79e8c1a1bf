"""Convolution of joined and padded tensors: one buffer, the dtype that is fastest here, weights packed for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from halovae.geometry import Extent
from halovae.kernels import gpu, winograd
from halovae.kernels.borders import Fill
from halovae.kernels.chain import Chain
from halovae.kernels.deferred import Deferred, plain
from halovae.kernels.formats import memory_format
from halovae.kernels.joined import Joined, joined_in
from halovae.kernels.packed import Geometry, convolve, prepared
from halovae.kernels.precision import LOW, working_dtype
from halovae.kernels.shapes import alike, device_type, in_turn
from halovae.kernels.slabs import WINDOW_BYTES, threads
from halovae.kernels.still import copies, is_still, with_frames
from halovae.kernels.weights import derived, make_room

MANY_ROWS = 16
"""With fewer inner rows than that, nothing is computed while the halo is under way."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Window:
    """A convolution without its input: weight in the dtype of the model, geometry by dimension."""

    weight: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    dilation: Sequence[int]
    first_tap: int = 0
    """Taps in time before this one meet zeros alone and are left out."""
    made: dict[bytes | None, Tensor] = field(default_factory=dict[bytes | None, Tensor])
    """What was made of the weight for pieces of the picture, by the order in which it is packed."""

    def kernel(self, dtype: torch.dtype) -> Tensor:
        """The weight that is in use, in a dtype."""
        first = self.first_tap
        return (self.weight[:, :, first:] if first else self.weight).to(dtype)

    def out_size(self, size: int, dim: int) -> int:
        taps = self.weight.shape[2 + dim] - (self.first_tap if dim == 0 else 0)
        return (size - self.dilation[dim] * (taps - 1) - 1) // self.stride[dim] + 1

    def reach(self, dim: int) -> int:
        return self.dilation[dim] * (self.weight.shape[2 + dim] - 1)


def convolution(
    tensor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The convolution of `[B, C, (T,) H, W]`, which may be deferred. One group; sizes are torch's."""
    n = weight.ndim - 2
    joined = joined_in(tensor)
    pads = {2 + i: (p, p) for i, p in enumerate(padding) if p}
    joined = joined.padded(pads, Fill()) or Joined((plain(tensor),)).padded(pads, Fill())
    assert joined is not None
    window = Window(alike(weight, joined.parts[0]), bias, tuple(stride), tuple(dilation))
    if n == 3:
        joined, window = _without_zero_frames(joined, window)
    if device_type(joined.device) != "cpu":
        return on_gpu(joined, window)
    frames = window.out_size(joined.shape[2], 0) if n == 3 else 1
    if frames > 1 and is_still(joined):
        return copies(_on_cpu(with_frames(joined, window.reach(0) + 1), window), frames)
    return _on_cpu(joined, window)


def _on_cpu(joined: Joined, window: Window) -> Tensor:
    work, weight = working_dtype(joined.dtype), window.weight
    shape = [joined.shape[0], len(weight), *(window.out_size(size, i) for i, size in enumerate(joined.shape[2:]))]
    make_room(prod(shape) * joined.dtype.itemsize)
    if winograd.fits(weight, window.stride, window.dilation) and winograd.pays(weight, shape, work):
        sums = winograd.sums_of(window.kernel(work))
        bias = None if window.bias is None else window.bias.to(work)
        step = winograd.rows_at_once(joined.shape, len(weight))
        return _by_rows(joined, window, shape, work, step, lambda rows, out: winograd.convolve(rows, sums, bias, out))
    if work == joined.dtype and _is_alone(joined):
        if not joined.halo:
            return _at_once(joined, window, work)
        if _is_same_size(joined, window, shape):
            return _inside_first(joined, window, shape, work)
    step = _rows_at_once(joined, window.stride[-2], work)
    zeros = [0] * (len(shape) - 2)
    return _by_rows(joined, window, shape, work, step, lambda rows, out: out.copy_(_run(rows, window, zeros, work)))


def _without_zero_frames(joined: Joined, window: Window) -> tuple[Joined, Window]:
    """Leave out zeros before the first frame, and the taps that meet them, where each tap meets nothing else."""
    before, after = joined.pads.get(2, (0, 0))
    zeros = joined.fill == Fill()
    once = window.out_size(joined.shape[2], 0) == 1 and window.stride[0] == 1 and window.dilation[0] == 1
    if not (before and zeros and once and before < window.weight.shape[2]):
        return joined, window
    pads = {**joined.pads, 2: (0, after)}
    return replace(joined, pads={d: p for d, p in pads.items() if p != (0, 0)}), replace(window, first_tap=before)


def on_gpu(joined: Joined, window: Window) -> Tensor:
    """At once: join and pad in time, let the operator pad height and width where it can."""
    n = len(joined.shape) - 2
    size = tuple(window.out_size(joined.shape[2 + i], i) for i in range(n))
    (top, bottom), (left, right) = (joined.pads.get(dim, (0, 0)) for dim in (n, n + 1))
    zeros = joined.fill == Fill()
    frames = replace(joined, pads={dim: pad for dim, pad in joined.pads.items() if dim < n})
    if zeros and gpu.convolves(window.weight, window.stride, window.dilation, joined.shape[0] * prod(size)):
        return gpu.convolve(
            frames.settled(), window.weight, window.bias, first_tap=window.first_tap, stride=window.stride[-1],
            before=(top, left), size=(size[-2], size[-1]),
        )  # fmt: skip
    if zeros and (top, left) == (bottom, right):
        return _by_library(frames.settled(), window, [*[0] * (n - 2), top, left])
    return _by_library(joined.settled(), window, [0] * n)


def _by_library(source: Tensor, window: Window, padding: Sequence[int]) -> Tensor:
    """Without the bias, which costs the vendor library a pass of its own: what follows adds it on its way."""
    bias = window.bias
    if bias is None or source.dtype not in LOW:
        return _run(source, window, padding, source.dtype)
    result = _run(source, replace(window, bias=None), padding, source.dtype)
    wide = derived(bias, "wide", lambda: bias.float().view(-1, *[1] * (source.ndim - 2)))
    return Deferred(Chain(result, result.dtype).plus(wide, frozenset((1,))))


def _is_alone(joined: Joined) -> bool:
    """Whether the operator itself can do the padding, and there is nothing to join."""
    halo = joined.halo
    symmetric = all(low == high for dim, (low, high) in joined.pads.items() if not halo or dim != halo.dim)
    return len(joined.parts) == 1 and symmetric and (not joined.pads or joined.fill == Fill())


def _is_same_size(joined: Joined, window: Window, shape: Sequence[int]) -> bool:
    """Whether the parts by themselves, padded evenly, give a result of this shape, most of it without the halo."""
    low, high = _inner_rows(joined, window, shape[-2])
    same = shape[-2] == joined.parts[0].shape[-2] and 2 * _row_padding(joined) == window.reach(len(shape) - 3)
    return same and max(window.stride) == 1 and high - low >= MANY_ROWS


def _row_padding(joined: Joined) -> int:
    """Rows before the parts, halo and padding together."""
    n = len(joined.shape) - 2
    halo = joined.halo.lengths[0] if joined.halo and joined.halo.dim == n else 0
    return halo + joined.pads.get(n, (0, 0))[0]


def _inner_rows(joined: Joined, window: Window, rows: int) -> Extent:
    """Rows of the result that need nothing of the halo; none where it lies left and right."""
    halo, n = joined.halo, len(joined.shape) - 2
    if halo is None:
        return 0, rows
    if halo.dim != n:
        return 0, 0
    (before, after), (top, bottom), stride = halo.lengths, joined.pads.get(n, (0, 0)), window.stride[-2]
    low = -(-(top + before) // stride) if before else 0
    end = joined.shape[n] - bottom - after
    high = (end - window.reach(n - 2) - 1) // stride + 1 if after else rows
    return low, max(low, high)


def _at_once(joined: Joined, window: Window, work: torch.dtype) -> Tensor:
    n = len(joined.shape) - 2
    source = joined.parts[0].contiguous(memory_format=memory_format(n + 2, True))
    return _run(source, window, [joined.pads.get(2 + i, (0, 0))[0] for i in range(n)], work)


def _by_rows(
    joined: Joined,
    window: Window,
    shape: Sequence[int],
    work: torch.dtype,
    step: int,
    run: Callable[[Tensor, Tensor], Any],
) -> Tensor:
    """Some rows at a time, so that only they exist joined and padded, and in the working dtype.

    Args:
        joined: the input.
        window: the convolution.
        shape: of the result.
        work: the dtype to convolve in.
        step: rows of the result at a time.
        run: convolves rows that are joined and padded, and writes the result into its second argument.
    """
    n, rows = len(shape) - 2, shape[-2]
    out = torch.empty(shape, dtype=joined.dtype, device=joined.device, memory_format=memory_format(n + 2, True))
    stride, reach = window.stride[-2], window.reach(n - 2)
    inner = _inner_rows(joined, window, rows)
    padded_far = max(joined.pads.get(n, (0, 0))) > reach  # a piece could lie in the padding alone
    spans = [(0, rows)] if padded_far else _in_order(*inner, rows, step)
    for low, high in in_turn(spans, out, lambda span: (span[1] - span[0], _is_inside(span, inner))):
        source = joined.rows(low * stride, (high - 1) * stride + reach + 1, work, True)
        run(source, out.narrow(-2, low, high - low))
    return out


def _inside_first(joined: Joined, window: Window, shape: Sequence[int], work: torch.dtype) -> Tensor:
    """All rows at once, as if zeros were around the parts; then those anew that need the halo."""
    n, rows = len(shape) - 2, shape[-2]
    pads = [joined.pads.get(2 + i, (0, 0))[0] for i in range(n)]
    pads[-2] = _row_padding(joined)
    out = _run(joined.parts[0].contiguous(memory_format=memory_format(n + 2, True)), window, pads, work)
    inner = _inner_rows(joined, window, rows)
    for low, high in ((0, inner[0]), (inner[1], rows)):
        if low < high:
            source = joined.rows(low, high + window.reach(n - 2), work, True)
            out.narrow(-2, low, high - low).copy_(_run(source, window, [0] * n, work))
    return out


def _in_order(low: int, high: int, rows: int, step: int) -> list[Extent]:
    """Pieces of `step` rows, or one more, at the most; those within `low` and `high` first, if these are many."""
    sides = (low > 0) + (high < rows)
    if sides and high - low >= MANY_ROWS:
        # Equal pieces, since one of the border alone would cost more than its rows; even ones, for Winograd's squares.
        pieces = max(1 + sides, -(-rows // step))
        step = 2 * -(-rows // (2 * pieces))
    spans = [(at, min(at + step, rows)) for at in range(0, rows, step)]
    return sorted(spans, key=lambda span: not _is_inside(span, (low, high)))


def _is_inside(span: Extent, inner: Extent) -> bool:
    return inner[0] <= span[0] and span[1] <= inner[1]


def _rows_at_once(joined: Joined, stride: int, work: torch.dtype) -> int:
    shape = joined.shape
    row = work.itemsize * stride
    for size in (*shape[:-2], shape[-1]):
        row *= size
    return max(4, WINDOW_BYTES * threads() // row)


def _run(source: Tensor, window: Window, padding: Sequence[int], work: torch.dtype) -> Tensor:
    first, taps = window.first_tap, window.weight.shape[2]

    def make() -> Tensor:
        return window.kernel(work)

    shape = (*window.weight.shape[:2], taps - first, *window.weight.shape[3:])
    geometry = Geometry(shape, work, tuple(source.shape), tuple(window.stride), tuple(padding), tuple(window.dilation))
    weight = prepared(window.weight, ("convolution", work, first), make, geometry, window.made)
    bias = None if window.bias is None else window.bias.to(work)
    return convolve(source, weight, bias, window.stride, padding, window.dilation)
