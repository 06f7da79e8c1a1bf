"""Convolution of joined and padded tensors: one buffer, the dtype that is fastest here, weights packed for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from halovae.kernels.cpu.packed import Geometry, convolve, prepared
from halovae.kernels.cpu.pieces import WINDOW_BYTES, Line, line_of
from halovae.kernels.fill import Fill
from halovae.kernels.gpu import convolutions
from halovae.kernels.kept import derived
from halovae.kernels.lazy.chain import Chain
from halovae.kernels.lazy.deferred import Deferred, plain
from halovae.kernels.lazy.joined import Joined, joined_in
from halovae.kernels.memory_format import memory_format, strides_of
from halovae.kernels.precision import working_dtype
from halovae.kernels.shapes_only import alike, device_type, in_turn

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Convolution:
    """A convolution without its input: weight in the dtype of the model, geometry by dimension."""

    weight: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    dilation: Sequence[int]
    first_tap: int = 0
    """Taps in time before this one meet zeros alone and are left out."""
    made: dict[Geometry, Tensor] = field(default_factory=dict[Geometry, Tensor])
    """What was made of the weight for the last piece of the picture."""

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
    # A kernel of one position needs nothing around its input.
    joined = joined_in(tensor if max(weight.shape[2:]) > 1 else plain(tensor))
    pads = {2 + i: (p, p) for i, p in enumerate(padding) if p}
    joined = joined.padded(pads, Fill()) or Joined((plain(tensor),)).padded(pads, Fill())
    assert joined is not None
    bias = None if bias is None else bias.contiguous()  # The kernels read it as it lies.
    window = Convolution(alike(weight, joined.parts[0]), bias, tuple(stride), tuple(dilation))
    if n == 3:
        joined, window = _without_zero_frames(joined, window)
    if device_type(joined.device) != "cpu":
        return on_gpu(joined, window)
    return _on_cpu(joined, window)


def _on_cpu(joined: Joined, window: Convolution) -> Tensor:
    work = working_dtype(joined.dtype)
    shape = [
        joined.shape[0],
        len(window.weight),
        *(window.out_size(size, i) for i, size in enumerate(joined.shape[2:])),
    ]
    line = line_of(joined, shape, window.stride, [window.reach(i) for i in range(len(shape) - 2)])
    if work == joined.dtype and _is_alone(joined) and (not joined.halo or _is_same_size(joined, window, line)):
        return _inside_first(joined, window, line, work)
    zeros = [0] * (len(shape) - 2)
    across = prod(joined.shape) // joined.shape[line.dim]
    step = max(4, WINDOW_BYTES * torch.get_num_threads() // (work.itemsize * line.stride * across))
    if step >= line.size and not joined.halo:
        result = _run(joined.slab(line.dim, line.source((0, line.size)), work, True), window, zeros, work)
        return result.to(joined.dtype, memory_format=memory_format(len(shape), True))
    return _by_pieces(joined, line, shape, work, step, lambda slab, out: out.copy_(_run(slab, window, zeros, work)))


def _without_zero_frames(joined: Joined, window: Convolution) -> tuple[Joined, Convolution]:
    """Leave out zeros before the first frame, and the taps that meet them, where each tap meets nothing else."""
    before, after = joined.pads.get(2, (0, 0))
    zeros = joined.fill == Fill()
    once = window.out_size(joined.shape[2], 0) == 1 and window.stride[0] == 1 and window.dilation[0] == 1
    if not (before and zeros and once and before < window.weight.shape[2]):
        return joined, window
    pads = {**joined.pads, 2: (0, after)}
    return replace(joined, pads={d: p for d, p in pads.items() if p != (0, 0)}), replace(window, first_tap=before)


def on_gpu(joined: Joined, window: Convolution) -> Tensor:
    """At once: join and pad in time, let the operator pad height and width where it can."""
    n = len(joined.shape) - 2
    size = tuple(window.out_size(joined.shape[2 + i], i) for i in range(n))
    (top, bottom), (left, right) = (joined.pads.get(dim, (0, 0)) for dim in (n, n + 1))
    zeros = joined.fill == Fill()
    frames = replace(joined, pads={dim: pad for dim, pad in joined.pads.items() if dim < n})
    if zeros and convolutions.convolves(window.weight, window.stride, window.dilation, joined.shape[0] * prod(size)):
        return convolutions.convolve(
            frames.settled(), window.weight, window.bias, first_tap=window.first_tap, stride=window.stride[-1],
            before=(top, left), size=(size[-2], size[-1]),
        )  # fmt: skip
    even = [before if zeros and before == after else 0 for before, after in ((top, bottom), (left, right))]
    pads = {dim: pad for dim, pad in joined.pads.items() if dim < n or not even[dim - n]}
    return _by_library(replace(joined, pads=pads).settled(), window, [*[0] * (n - 2), *even])


def _by_library(source: Tensor, window: Convolution, padding: Sequence[int]) -> Tensor:
    """Without the bias, which costs the vendor library a pass of its own: what follows adds it on its way."""
    bias = window.bias
    if bias is None or source.dtype == torch.float64:
        return _run(source, window, padding, source.dtype)
    result = _run(source, replace(window, bias=None), padding, source.dtype)
    if result.is_meta:  # where torch knows nothing of the library's order
        result = result.as_strided(result.shape, strides_of(tuple(result.shape), channels_last=True))
    wide = derived(bias, "wide", lambda: bias.float().view(-1, *[1] * (source.ndim - 2)))
    return Deferred(Chain(result, result.dtype).plus(wide))


def _is_alone(joined: Joined) -> bool:
    """Whether the operator itself can do the padding, and there is nothing to join."""
    halo = joined.halo
    symmetric = all(low == high for dim, (low, high) in joined.pads.items() if not halo or dim != halo.dim)
    return len(joined.parts) == 1 and symmetric and (not joined.pads or joined.fill == Fill())


def _is_same_size(joined: Joined, window: Convolution, line: Line) -> bool:
    """Whether the parts by themselves, padded evenly, give a result of this shape, most of it without the halo."""
    halo = joined.halo
    if halo is None or halo.dim != line.dim or not line.has_many_inside or max(window.stride) > 1:
        return False
    return line.size == joined.parts[0].shape[line.dim] and 2 * _lead(joined, line.dim) == line.reach


def _lead(joined: Joined, dim: int) -> int:
    """Positions before the parts, halo and padding together."""
    halo = joined.halo.lengths[0] if joined.halo and joined.halo.dim == dim else 0
    return halo + joined.pads.get(dim, (0, 0))[0]


def _by_pieces(
    joined: Joined,
    line: Line,
    shape: Sequence[int],
    work: torch.dtype,
    step: int,
    run: Callable[[Tensor, Tensor], Any],
) -> Tensor:
    """Some rows or columns at a time, so that only they exist joined and padded, and in the working dtype.

    Args:
        step: rows or columns of the result at a time.
        run: convolves a slab that is joined and padded, and writes the result into its second argument.
    """
    out = torch.empty(shape, dtype=joined.dtype, device=joined.device, memory_format=memory_format(len(shape), True))
    padded_far = max(joined.pads.get(line.dim, (0, 0))) > line.reach  # a piece could lie in the padding alone
    spans = [(0, line.size)] if padded_far else line.in_order(step)
    for span in in_turn(spans, out, lambda span: (span[1] - span[0], line.is_inside(span))):
        slab = joined.slab(line.dim, line.source(span), work, True)
        run(slab, out.narrow(line.dim, span[0], span[1] - span[0]))
    return out


def _inside_first(joined: Joined, window: Convolution, line: Line, work: torch.dtype) -> Tensor:
    """All at once, as if zeros were around the parts; then those rows or columns anew that need the halo, if any."""
    n = len(joined.shape) - 2
    pads = [_lead(joined, dim) for dim in range(2, n + 2)]
    out = _run(joined.parts[0].contiguous(memory_format=memory_format(n + 2, True)), window, pads, work)
    for span in line.borders:
        slab = joined.slab(line.dim, line.source(span), work, True)
        out.narrow(line.dim, span[0], span[1] - span[0]).copy_(_run(slab, window, [0] * n, work))
    return out


def _run(source: Tensor, window: Convolution, padding: Sequence[int], work: torch.dtype) -> Tensor:
    first, taps = window.first_tap, window.weight.shape[2]
    if work == torch.float64 and source.ndim == 5 and taps - first == 1 and source.shape[2] > 1 == window.stride[0]:
        # The library's last bits depend on how many positions there are: a frame is to be the same in any clip.
        return torch.cat([_run(frame, window, padding, work) for frame in source.split(1, 2)], 2)

    def make() -> Tensor:
        return window.kernel(work)

    shape = (*window.weight.shape[:2], taps - first, *window.weight.shape[3:])
    geometry = Geometry(shape, work, tuple(source.shape), tuple(window.stride), tuple(padding), tuple(window.dilation))
    weight = prepared(window.weight, ("convolution", work, first), make, geometry, window.made)
    bias = None if window.bias is None else window.bias.to(work)
    return convolve(source, weight, bias, window.stride, padding, window.dilation)
