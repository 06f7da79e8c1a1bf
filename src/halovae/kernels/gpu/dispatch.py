"""What an accelerator gets: Triton's kernels where they win, the vendor library on channels-last memory elsewhere."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from halovae.base.geometry import Extent
from halovae.base.private_torch import without_functions
from halovae.kernels.fill import Fill
from halovae.kernels.gpu import operators
from halovae.kernels.kept import derived, kept
from halovae.kernels.memory_format import memory_format, memory_of
from halovae.kernels.precision import LOW
from halovae.kernels.shapes_only import alike, device_type

FEW_POSITIONS = 1 << 14
"""Of the output. Below, the vendor library has kernels that share out the sum; above, ours fills the device."""

FEW_QUERIES = 1 << 12
"""Below, the pieces are too small for the library's products."""

NARROW_WIDTH = 128
"""The widest head for which the vendor has its fastest kernels."""

FEW_TOKENS = 1 << 9
"""Below, any kernel is fast enough."""

_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

FUSED_WIDTH = 256
"""The widest head for which the vendor has fast fused kernels."""

_DEPTH = 16
"""Input channels that are read at once, at least."""

_LARGEST_BLOCK = 256
"""Pixels of a block, times channels whose mean is taken, that one tile holds."""

_MANY = 1 << 16
"""Elements from which a copy takes longer than it takes to ask for it."""


def supports(device: torch.device) -> bool:
    """Whether there are kernels for this device: Triton has to be there, as it is with torch for CUDA and ROCm."""
    return device_type(device) == "cuda" and _has_triton()


def _are_many(count: int, least: int) -> bool:
    """Whether there is so much work that a kernel pays."""
    return count >= least or _is_large.get()


_is_large: ContextVar[bool] = ContextVar("_is_large", default=False)


@contextmanager
def as_if_large() -> Iterator[None]:
    """Within it, a small picture gets the kernels of a large one."""
    token = _is_large.set(True)
    try:
        yield
    finally:
        _is_large.reset(token)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def chain(
    base: Tensor, dtype: torch.dtype, wide: torch.dtype, steps: Sequence[Any], shape: Sequence[int] | None = None
) -> Tensor:
    """The steps of a `Chain`, calculated in `wide`, rounded once to `dtype`: in one pass where they are of one form.

    The result may be asked for in another shape, whose positions follow each other in the same order.
    """
    if (form := _one_pass(base, wide, steps)) is None:
        work = base.to(wide, copy=True)
        for step in steps:
            step.run(work)
        found = work.to(dtype)
        if shape is None:
            return found
        return found.movedim(1, -1).reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return _run_chain(base, _with_room(shape or base.shape, dtype, base.device), form)


def sum_of(base: Tensor, dtype: torch.dtype, wide: torch.dtype, steps: Sequence[Any], other: Tensor) -> Tensor | None:
    """The steps of a `Chain`, and `other` added, in one pass; None where that is more than a bias and a sum."""
    form = _one_pass(base, wide, steps)
    if form is None or form.keys() - {"shift"}:
        return None
    out = _with_room(base.shape, dtype, base.device, "sum")
    other = other.contiguous(memory_format=memory_format(base.ndim, True))
    return _run_chain(base, out, {**form, "other": _positions(other)})


def add_and_norm(
    tokens: Tensor, *, other: Tensor | None = None, scale: Tensor | None = None, total: Tensor | None = None,
    normed: Tensor | None = None, weight: Tensor | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    """As `triton_tokens.add_and_norm`, of dense tokens `[..., C]`."""
    from halovae.kernels.gpu import triton_tokens

    rows = (None if t is None else t.view(-1, t.shape[-1]) for t in (tokens, other, total, normed))
    positions, term, together, divided = rows
    assert positions is not None
    triton_tokens.add_and_norm(
        positions, other=term, scale=scale, total=together, normed=divided, weight=weight, eps=eps
    )


def rotate(
    tokens: Tensor, out: Tensor, *, cosines: Tensor, sines: Tensor, normed: bool = False, weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:  # fmt: skip
    """As `triton_tokens.rotate`, of dense tokens `[N, places, heads, C]`."""
    from halovae.kernels.gpu import triton_tokens

    heads, channels = tokens.shape[-2:]
    triton_tokens.rotate(
        tokens.view(-1, channels), out.view(-1, channels), cosines=cosines, sines=sines, heads=heads, normed=normed,
        weight=weight, eps=eps,
    )  # fmt: skip


def gate(tokens: Tensor, gates: Tensor, out: Tensor) -> None:
    """As `triton_tokens.gate`, of tokens `[..., C]` that step alike."""
    from halovae.kernels.gpu import triton_tokens

    triton_tokens.gate(*(t.view(-1, t.shape[-1]) for t in (tokens, gates, out)))


def moments(picture: Tensor, groups: int, shift: Tensor | None) -> Tensor:
    """As `triton_norms.moments`, of a picture."""
    positions = _positions_of_each(picture)
    if positions.is_meta:
        return operators.moments(positions, groups, shift)
    from halovae.kernels.gpu import triton_norms

    return triton_norms.moments(positions, groups, shift)


def merged_moments(parts: Tensor, groups: int) -> Tensor:
    """As `triton_norms.merged`."""
    if parts.is_meta:
        return operators.merged(parts, groups)
    from halovae.kernels.gpu import triton_norms

    return triton_norms.merged(parts, groups)


def affine(
    parts: Tensor, groups: int, channels: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    """As `triton_norms.affine`."""
    weight, bias = (None if p is None else alike(p, parts).contiguous() for p in (weight, bias))
    if parts.is_meta:
        return operators.affine(parts, groups, channels, weight, bias, eps)
    from halovae.kernels.gpu import triton_norms

    return triton_norms.affine(parts, groups, channels, weight, bias, eps)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor | None:
    """Of `[N, heads, L, D]` by what is fastest; None where that is torch's own choice.

    One head that is too wide for the vendor's fused kernels goes through the library's products. For narrow heads the
    vendor's own kernel is asked for, which on Hopper is faster than the one that torch prefers (measured for 1,797
    tokens and heads of 64: 320 TFLOP/s beside 223).
    """
    if query.dtype not in LOW or query.is_meta or not supports(query.device):
        return None
    if query.shape[3] <= NARROW_WIDTH and _are_many(query.shape[2], FEW_TOKENS) and _is_hopper(query.device):
        with sdpa_kernel(_BACKENDS, set_priority=True), without_functions():
            return F.scaled_dot_product_attention(query, key, value, scale=scale)
    wide = query.shape[3] > FUSED_WIDTH and query.shape[1] == key.shape[1] == value.shape[1] == 1
    if not wide or not _are_many(query.shape[2], FEW_QUERIES):
        return None
    from halovae.kernels.gpu import triton_attention

    if not triton_attention.has_wide_products():
        return None
    return triton_attention.run(query.squeeze(1), key.squeeze(1), value.squeeze(1), scale).unsqueeze(1)


def _run_chain(base: Tensor, out: Tensor, form: dict[str, Any]) -> Tensor:
    base = base.contiguous(memory_format=memory_format(base.ndim, True))
    last = memory_format(out.ndim, True)
    if out.is_meta:
        whole = out if out.is_contiguous(memory_format=last) else getattr(out, "room", out)
        operators.chain(_positions(base), _positions(whole)[: len(_positions(base))], **form)
        return out
    from halovae.kernels.gpu import triton_chain

    if out.is_contiguous(memory_format=last):
        triton_chain.run(_positions(base), _positions(out), **form)
    else:
        height, width = out.shape[-2:]
        frames = (out.shape[2], out.stride(0), out.stride(2)) if out.ndim == 5 else (len(out), 0, out.stride(0))
        room = Places(height, width, *frames, out.stride(-2))
        triton_chain.run(_positions(base), out, **form, room=room)
    return out


_is_to_be_joined: ContextVar[bool] = ContextVar("_is_to_be_joined", default=False)


@contextmanager
def leaving_room() -> Iterator[None]:
    """Within it, what is computed goes into a join. Elsewhere a network may view it in ways that gaps forbid."""
    token = _is_to_be_joined.set(True)
    try:
        yield
    finally:
        _is_to_be_joined.reset(token)


def _with_room(shape: Sequence[int], dtype: torch.dtype, device: torch.device, maker: str = "chain") -> Tensor:
    """An uninitialised channels-last tensor of this shape; for a join, with as much room as the last one took.

    Whether a sum goes into a join is not known when it is made: it has room only before and behind all of it.
    """
    around = kept().rooms.get((maker, tuple(shape)))
    has_gaps = around is not None and (len(shape) < 5 or shape[0] > 1 or any(map(any, around[3:])))
    if not _is_to_be_joined.get() and (has_gaps or maker == "chain"):
        around = None
    whole = shape if around is None else [size + sum(more) for size, more in zip(shape, around, strict=True)]
    last = memory_format(len(shape), True)
    out = room = torch.empty(tuple(whole), dtype=dtype, device=device, memory_format=last)
    for dim, (before, _) in enumerate(around or ()):
        out = out.narrow(dim, before, shape[dim])
    out.room, out.maker = None if around is None else room, maker  # type: ignore[attr-defined]
    return out


def room_of(part: Tensor, starts: Sequence[int], shape: Sequence[int]) -> Tensor | None:
    """The memory around a part of a larger tensor, to join and pad the part there without copying it.

    To be used at once: who asks for it again writes over what is around the part.

    Args:
        part: what a chain or a sum has made, to have any.
        starts: where it begins in the larger tensor, along each dimension.
        shape: of the larger tensor.

    Returns:
        A tensor of that shape with the part in its place, the rest uninitialised; None where there is none. The next
        such part will have it.
    """
    if not hasattr(part, "room") or part.shape[:2] != tuple(shape[:2]):
        return None
    room: Tensor | None = part.room  # type: ignore[attr-defined]
    if room is not None and tuple(room.shape) == tuple(shape) and part.storage_offset() == _offset(room, starts):
        return room
    sizes = zip(starts, part.shape, shape, strict=True)
    maker: str = part.maker  # type: ignore[attr-defined]
    kept().rooms[maker, tuple(part.shape)] = tuple((start, whole - size - start) for start, size, whole in sizes)
    return None


def _offset(tensor: Tensor, place: Sequence[int]) -> int:
    return sum(start * step for start, step in zip(place, tensor.stride(), strict=True))


def copy(target: Tensor, source: Tensor) -> None:
    """As `target.copy_(source)`."""
    if not (supports(target.device) and _is_large_picture(target) and target.dtype == source.dtype):
        target.copy_(source)
        return
    from halovae.kernels.gpu import triton_copy

    for frames, out in zip(_frames(source), _frames(target), strict=True):
        if not (triton_copy.fits(frames) and triton_copy.fits(out)):
            out.copy_(frames)
        elif out.is_meta:
            operators.copy(frames.movedim(-1, 1), out.movedim(-1, 1))
        else:
            triton_copy.run(frames, out)


def fill(buffer: Tensor, valid: Sequence[Extent], fills: Mapping[int, Fill]) -> bool:
    """As `fill_outside` for each dimension, in one pass; False, and nothing done, where that is not for the kernel.

    Args:
        buffer: a picture or videos.
        valid: what is there, along each dimension.
        fills: what lies beyond it.
    """
    if not supports(buffer.device) or buffer.is_meta or {fill.mode for fill in fills.values()} <= {"constant"}:
        return False
    videos = _frames(buffer)
    known = buffer.ndim in (4, 5) and buffer.dtype in (torch.float32, *LOW) and min(fills) >= 2
    if not known or not _are_many(buffer.numel(), _MANY) or not _has_whole_rows(videos):
        return False
    for dim, each in fills.items():
        low, high = valid[dim]
        if each.mode == "reflect" and max(low, buffer.shape[dim] - high) >= high - low:
            return False
    alone = [(0, len(buffer))] if buffer.ndim == 4 else []
    sides = [(valid[dim], fills.get(dim, Fill())) for dim in range(2, buffer.ndim)]
    from halovae.kernels.gpu import triton_copy

    triton_copy.run_fill(videos, [*((extent, Fill()) for extent in alone), *sides])
    return True


def shuffle(target: Tensor, source: Tensor) -> None:
    """As `target.copy_(source)`, of views whose pixels and channels have changed places."""
    found = None
    known = supports(target.device) and target.dtype == source.dtype and not target.is_meta
    if known and _are_many(target.numel(), _MANY):
        from halovae.kernels.gpu import triton_copy

        found = triton_copy.shuffle_of(target.shape, source.stride(), target.stride())
        if found is not None:
            triton_copy.run_shuffle(source, target, found)
    if found is None:
        target.copy_(source)


class Term(NamedTuple):
    """What is read as blocks `[B, C, p, q, r, T, H, W]` of a channels-last video."""

    picture: Tensor
    """It begins where the blocks do, or behind the frames `before`."""
    steps: Sequence[int]
    """Elements from block to block, or pixel to pixel, along each dimension; 1 from channel to channel."""
    shape: Sequence[int]
    """Of the blocks."""
    group: int
    """Of so many channels that follow each other the mean is taken, once all pixels of a block are its channels."""
    shift: Any = None
    """Added to each channel before: a parameter in float32 that broadcasts along everything but channels, or None."""
    before: Tensor | None = None
    """Frames before the first one of the picture."""


def sum_of_shuffled(shape: Sequence[int], dtype: torch.dtype, terms: Sequence[Term]) -> Tensor | None:
    """The sum of one or two terms in float32, rounded once; None where that is not for the kernel.

    Args:
        shape: `[B, C', T, H, W]`, of each term once its pixels are channels and means are taken.
        dtype: of the result.
        terms: in the same dtype.
    """
    shifts = [_by_channel(term.shift, term.picture) if isinstance(term.shift, Tensor) else None for term in terms]
    for term, shift in zip(terms, shifts, strict=True):
        if not _fits(term) or (term.shift is not None and (shift is None or shift.ndim > 1)):
            return None
    terms = [Term(*term[:4], shift, term.before) for term, shift in zip(terms, shifts, strict=True)]
    out = torch.empty(
        tuple(shape), dtype=dtype, device=terms[0].picture.device, memory_format=memory_format(5, channels_last=True)
    )
    if out.is_meta:  # One pass over as much: the larger side of a mean is left out.
        operators.chain(_positions(out), _positions(out), other=_positions(out) if len(terms) > 1 else None)
        return out
    from halovae.kernels.gpu import triton_shuffled

    triton_shuffled.run(terms, out)
    return out


def _fits(term: Term) -> bool:
    """Whether blocks and groups divide a tile evenly, and whatever comes before is of the same memory."""
    sizes = *term.shape[2:5], term.group
    before, picture = term.before, term.picture
    together = before is None or (
        memory_of(before) == memory_of(picture) and (before.stride(), before.dtype) == (picture.stride(), picture.dtype)
    )
    powers = all(size & (size - 1) == 0 for size in sizes)
    return together and powers and prod(sizes) <= _LARGEST_BLOCK and term.steps[1] == 1


def _frames(picture: Tensor) -> Tensor:
    """A batch of pictures as `[1, T, H, W, C]`, or videos as `[B, T, H, W, C]`."""
    last = picture.movedim(1, -1)
    return last[None] if picture.ndim == 4 else last


def _has_whole_rows(videos: Tensor) -> bool:
    """Whether each row of `[B, T, H, W, C]` is one stretch of memory."""
    return videos.stride(4) == 1 and videos.stride(3) == videos.shape[4]


def _is_large_picture(tensor: Tensor) -> bool:
    return _are_many(tensor.numel(), _MANY) and tensor.ndim in (4, 5)


def _positions(picture: Tensor) -> Tensor:
    """A channels-last picture as `[positions, C]`."""
    return picture.movedim(1, -1).reshape(-1, picture.shape[1])


def _positions_of_each(pictures: Tensor) -> Tensor:
    """Pictures as `[N, positions, C]`, dense."""
    last = pictures.contiguous(memory_format=memory_format(pictures.ndim, True)).movedim(1, -1)
    return last.reshape(len(pictures), -1, pictures.shape[1])


class Spread(NamedTuple):
    """How positions of a video stand for those of a larger one."""

    frames: int
    """Of the larger one, as the next two."""
    height: int
    width: int
    small_frames: int
    first: bool
    """Whether the first frame stands for one only."""
    time: int
    """The binary logarithm of the repeats in time, and so on."""
    down: int
    across: int


class Places(NamedTuple):
    """Where the positions of pictures lie in memory that has room around them."""

    height: int
    """Of a picture, as the next one."""
    width: int
    length: int
    """Of a video, in pictures."""
    video: int
    """Elements from the beginning of one video to that of the next."""
    frame: int
    """Elements from the beginning of one picture to that of the next."""
    row: int
    """Likewise of rows."""


_SLOTS = (
    ("shift", {"plus"}), ("normalize", {"normalize", "rms"}), ("times", {"times"}), ("plus", {"plus"}),
    ("by", {"times picture"}), ("more", {"plus picture"}), ("silu", {"silu"}),
)  # fmt: skip
"""Arguments of `gpu_chain.run` in the order in which it uses them, and the kind of step that each of them is."""


def _one_pass(base: Tensor, wide: torch.dtype, steps: Sequence[Any]) -> dict[str, Any] | None:
    """Arguments for `gpu_chain.run`; None where it does something else than these steps, or in another order."""
    if wide != torch.float32 or base.shape[1] == 1:
        return None
    form: dict[str, Any] = {}
    slots = iter(_SLOTS)
    for step in steps:
        name = next((name for name, kinds in slots if step.kind in kinds), None)
        value: Any = step.value
        if step.kind in ("normalize", "rms"):
            dim, value = value
            if dim != 1:
                return None
            form["mean"] = step.kind == "rms"
        elif step.kind == "silu":
            value = True
        elif step.kind.endswith("picture"):
            (frames, height, width), (time, down, across) = value.shape[2:], value.shifts
            spread = Spread(frames, height, width, value.base.shape[2], value.first, time, down, across)
            if form.setdefault("spread", spread) != spread:
                return None
            value = _positions(value.base.contiguous(memory_format=memory_format(base.ndim, True)))
        elif isinstance(value, Tensor):
            value = _by_channel(value, base)
        if name is None or value is None:
            return None
        form[name] = value
    return form


def _by_channel(parameter: Tensor, base: Tensor) -> Tensor | None:
    """A parameter that broadcasts along everything but channels, as `[C]`, or for each picture, as `[N, C]`."""
    if parameter.ndim == base.ndim and parameter.shape[:2] == base.shape[:2] and {*parameter.shape[2:]} == {1}:
        return parameter.reshape(-1 if len(base) == 1 else len(base), base.shape[1])[
            0 if len(base) == 1 else slice(None)
        ]
    place = parameter.ndim - (base.ndim - 1)
    varies = parameter.numel() > 1
    if varies and (place < 0 or parameter.shape[place] != parameter.numel()):
        return None
    return parameter.flatten().expand(base.shape[1]).contiguous()


def convolves(weight: Tensor, stride: Sequence[int], dilation: Sequence[int], positions: int) -> bool:
    """Whether the convolution is one that Triton's kernel is faster at than the vendor library, as measured on Hopper.

    It is where the library pads input channels to its tiles of 64 (96 of them: 385 TFLOP/s beside 294; where nothing
    is padded the library has 600 to 800), of the three channels of a sample over time, for which it has no kernel with
    tensor cores, and with the padding of one side only that strided convolutions have.
    """
    _, inputs, *taps = weight.shape
    fits = weight.dtype in LOW and stride[-1] == stride[-2] and {*dilation} == {1} and (*stride[:-2], 1)[0] == 1
    wins = (16 < inputs <= 128 and inputs % 64 > 0) or stride[-1] == 2 or _is_sample(weight, stride[-1])
    return fits and wins and taps[-1] == taps[-2] == 3 and _are_many(positions, FEW_POSITIONS)


def convolve(
    picture: Tensor, weight: Tensor, bias: Tensor | None, *, first_tap: int, stride: int, before: tuple[int, int],
    size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Convolve `[B, C, (T,) H, W]` without padding in time.

    Args:
        picture: the input.
        weight: `[outputs, C, (taps,) 3, 3]`.
        bias: of the outputs, or None.
        first_tap: taps in time before this one are left out.
        stride: in height and width.
        before: zeros above and to the left; as many follow as `size` asks for.
        size: rows and columns of the output.
    """
    from halovae.kernels.gpu import triton_convolution

    used = weight.narrow(2, first_tap, weight.shape[2] - first_tap) if first_tap else weight
    few = _is_sample(weight, stride)
    inputs = _DEPTH if few else weight.shape[1]
    tile = triton_convolution.tile_for(inputs, weight.shape[0])
    packed = derived(
        weight,
        ("gpu", first_tap, tile),
        lambda: triton_convolution.pack(_taps_as_channels(used) if few else used, tile),
    )
    if few:
        picture = _neighbours_as_channels(picture, weight.shape[-1], before[1], size[1])
        used, before = used[..., :1], (before[0], 0)
    taps = (1, *used.shape[2:])[-3:]
    length = picture.shape[2] - taps[0] + 1
    shape = (len(picture), len(weight), *((length,) if picture.ndim == 5 else ()), *size)
    return _by_frames(picture, shape, packed, bias, tile, kernel=taps, stride=stride, before=before)


def _is_sample(weight: Tensor, stride: int) -> bool:
    """Whether a convolution over time has so few inputs that all that meets a row of its kernel is read at once."""
    return weight.ndim == 5 and weight.shape[1] * weight.shape[-1] <= _DEPTH and stride == 1


def _taps_as_channels(weight: Tensor) -> Tensor:
    """`[outputs, C, T, H, W]` as `[outputs, 16, T, H, 1]`, zeros at the end."""
    rows = weight.movedim(-1, 1).flatten(1, 2)
    return torch.nn.functional.pad(rows, (0,) * 5 + (_DEPTH - rows.shape[1],)).unsqueeze(-1)


def _neighbours_as_channels(video: Tensor, taps: int, left: int, width: int) -> Tensor:
    """What the taps of a row meet, as channels: `[B, C, T, H, W]` to `[B, 16, T, H, width]`, with zeros around."""
    batch, channels, *sizes = video.shape
    out = torch.zeros((batch, *sizes[:2], width, _DEPTH), dtype=video.dtype, device=video.device).movedim(-1, 1)
    for tap in range(taps):
        low, high = max(0, left - tap), min(width, sizes[2] + left - tap)
        target = out.narrow(1, tap * channels, channels).narrow(4, low, high - low)
        target.copy_(video.narrow(4, low - left + tap, high - low))
    return out


def convolve_upsampled(picture: Tensor, weight: Tensor, bias: Tensor | None, bordered: Collection[int] = ()) -> Tensor:
    """Double `[B, C, H, W]` in height and width by repeating, and convolve it with `[outputs, C, 3, 3]`, padding 1.

    In `bordered` dimensions the picture has one more row before and after, and no padding is due.
    """
    from halovae.kernels.gpu import triton_convolution

    tile = triton_convolution.tile_for(weight.shape[1], weight.shape[0])
    packed = derived(weight, ("gpu upsampled", tile), lambda: triton_convolution.pack_upsampled(weight, tile))
    top, left = (0 if dim in bordered else 1 for dim in (2, 3))
    size = (2 * (picture.shape[2] - 2 * (1 - top)), 2 * (picture.shape[3] - 2 * (1 - left)))
    shape = (len(picture), len(weight), *size)
    return _by_frames(picture, shape, packed, bias, tile, kernel=(1, 2, 2), stride=1, before=(top, left), upsample=2)


def _by_frames(
    picture: Tensor, shape: Sequence[int], packed: Tensor, bias: Tensor | None, tile: Any, **geometry: Any
) -> Tensor:
    """Pictures are frames without a kernel in time; videos are taken one by one."""
    from halovae.kernels.gpu.triton_convolution import convolve as convolve_frames

    last = memory_format(picture.ndim, True)
    picture = picture.contiguous(memory_format=last)
    out = torch.empty(shape, dtype=picture.dtype, device=picture.device, memory_format=last)
    videos = [(picture, out)] if picture.ndim == 4 else zip(picture.transpose(1, 2), out.transpose(1, 2), strict=True)
    for source, target in videos:
        if out.is_meta:
            operators.convolve(source, packed, bias, out=target, **geometry)
            continue
        convolve_frames(source.movedim(1, -1), packed, bias, tile, out=target.movedim(1, -1), **geometry)
    return out
