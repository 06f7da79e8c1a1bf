"""Rules for what only moves numbers, such as padding, joins, views and repeats: it waits for who uses it, or stays
channels last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.base.functions import named
from halovae.kernels.fast_rules import fits, has_kernels, rule
from halovae.kernels.fill import Fill
from halovae.kernels.gpu import copies
from halovae.kernels.lazy import tokens
from halovae.kernels.lazy.chain import Chain, Seen
from halovae.kernels.lazy.deferred import Deferred, plain, recipe_of
from halovae.kernels.lazy.joined import Joined, copy_of, parts_in, read, to_join
from halovae.kernels.lazy.masks import RowPrefixes
from halovae.kernels.lazy.shuffled import Shuffled, shuffled
from halovae.kernels.lazy.upsampled import (
    FramesOf,
    Repeated,
    Upsampled,
    joined_repeats,
    repeats_of,
)
from halovae.kernels.memory_format import is_channels_last, is_dense_channels_last
from halovae.kernels.precision import LOW
from halovae.kernels.shapes_only import device_type


@rule(F.pad)
def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    amounts = {input.ndim - 1 - i // 2: (int(pad[i]), int(pad[i + 1])) for i in range(0, len(pad), 2)}
    if not fits(input) or min(map(min, amounts.values()), default=0) < 0:
        return None
    mirrored = mode == "reflect" and device_type(input.device) != "cpu"  # on a CPU pictures go in pieces
    if mode not in ("constant", "replicate") and not mirrored:
        return None
    if mirrored and any(max(amount) >= input.shape[dim] for dim, amount in amounts.items()):
        return None  # torch says what is wrong
    if any(dim < 2 and amount != (0, 0) for dim, amount in amounts.items()):
        return None
    recipe = recipe_of(input)
    fill = Fill(mode, float(value or 0.0))
    joined = recipe.padded(amounts, fill) if isinstance(recipe, Joined) else None
    joined = joined or Joined((to_join(input),)).padded(amounts, fill)
    return Deferred(joined) if joined else None


@rule(*named("cat", "concat", "concatenate"))
def cat(tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Any:
    if dim == -1 and not kwargs and (found := tokens.joined(tensors)) is not None:
        return found
    if kwargs or not isinstance(dim, int) or not all(isinstance(t, Tensor) and t.ndim == 5 for t in tensors):
        return None
    # Nothing before a video is what networks without a causal cache join it to; torch's own would transpose it.
    parts = [t for t in tensors if t.shape[2]]
    if dim % 5 != 2 or len({t.dtype for t in tensors}) > 1 or not parts or not all(map(fits, parts)):
        return None
    if len({(*tensor.shape[:2], *tensor.shape[3:]) for tensor in tensors}) > 1:
        return None
    if (repeated := joined_repeats([recipe_of(t) for t in parts])) is not None:
        return Deferred(repeated)
    return Deferred(Joined(tuple(part for t in parts for part in parts_in(t))))


@rule(torch.stack)
def stack(tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Any:
    """Videos, frame by frame in turn, stay channels last."""
    first = tensors[0]
    if kwargs or dim != 3 or not all(fits(t) and t.ndim == 5 for t in tensors) or device_type(first.device) == "cpu":
        return None
    parts = [plain(read(tensor)) for tensor in tensors]
    if not all((t.shape, t.dtype) == (first.shape, first.dtype) and is_channels_last(t) for t in parts):
        return None
    batch, channels, frames, *sizes = first.shape
    shape = (batch, frames, len(parts), *sizes, channels)
    out = torch.empty(shape, dtype=first.dtype, device=first.device).movedim(-1, 1)
    for place, part in enumerate(parts):
        out.select(3, place).copy_(part)
    return out


@rule(Tensor.__getitem__)
def getitem(tensor: Tensor, index: Any) -> Any:
    """Frames of what is joined, from its parts; one picture as a video of one frame, while it waits to be upsampled."""
    recipe = recipe_of(tensor)
    if recipe is None or not isinstance(index, tuple):
        return None
    if len(index) == 2 and index[0] is ... and isinstance(index[1], slice):
        return tokens.part(tensor, index[1])
    places = tuple("whole" if place == slice(None) else place for place in index)
    places += ("whole",) * (tensor.ndim - sum(place is not None for place in places))
    if isinstance(recipe, Upsampled) and places == ("whole", "whole", None, "whole", "whole"):
        video = recipe.as_video()
        return None if video is None else Deferred(video)
    frames = places[2] if len(places) > 2 else None
    if not isinstance(frames, slice) or any(place != "whole" for place in (*places[:2], *places[3:])):
        return None
    if isinstance(recipe, Repeated) and frames.indices(recipe.shape[2]) == (0, recipe.shape[2], 1):
        return Deferred(recipe)
    if isinstance(recipe, Chain) and tensor.ndim == 5 and device_type(recipe.device) != "cpu":
        return to_join(tensor)[index]  # most likely to be put before or behind the rest
    if not isinstance(recipe, Joined):
        return None
    found = recipe.frames(*frames.indices(recipe.shape[2]))
    return None if found is None else Deferred(found)


@rule(*named("clone"))
def clone(tensor: Tensor, **kwargs: Any) -> Any:
    """Of a copy that waits, and of positions that are repeated when somebody asks for them."""
    if kwargs:
        return None
    recipe = recipe_of(tensor)
    if isinstance(recipe, Repeated):
        return Deferred(recipe)
    source = read(tensor)
    return None if source is tensor or recipe_of(source) else source.clone()


@rule(F.interpolate)
def interpolate(
    input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *others: Any, **more: Any
) -> Any:
    if not fits(input) or mode not in ("nearest", "nearest-exact") or any(others) or any(more.values()):
        return None
    if input.ndim == 5:
        base = plain(read(input))
        found = repeats_of(base, size, scale_factor) if device_type(input.device) != "cpu" else None
        return None if found is None else Deferred(found)
    if scale_factor is None or size is not None or not _twice(scale_factor):
        return None
    recipe = recipe_of(input)
    casts_only = isinstance(recipe, Chain) and not recipe.steps and torch.promote_types(
        recipe.base.dtype, input.dtype) == input.dtype  # fmt: skip
    base = recipe.base if isinstance(recipe, Chain) and casts_only else plain(read(input))
    return Deferred(Upsampled(base, input.dtype, mode))


def _twice(factor: Any) -> bool:
    return all(f == 2 for f in factor) if isinstance(factor, (list, tuple)) else factor == 2


@rule(Tensor.contiguous)
def contiguous(tensor: Tensor, **kwargs: Any) -> Any:
    """The order in memory stays as it is: who asks for this one has views in mind, which the mode takes care of."""
    if kwargs or not fits(tensor):
        return None
    if isinstance(tensor, Deferred):
        return tensor
    is_frames = tensor.ndim == 5 and is_dense_channels_last(tensor.transpose(1, 2))
    return Deferred(copy_of(tensor)) if is_frames or is_dense_channels_last(tensor) else None


@rule(Tensor.view)
def view(tensor: Tensor, *sizes: Any) -> Any:
    """Frames as pictures of a batch, and back: what is to be done to them goes on waiting."""
    shape: Any = sizes[0] if len(sizes) == 1 else sizes
    if not isinstance(tensor, Deferred) or not isinstance(shape, (tuple, list)) or len(shape) not in (4, 5):
        return None
    if (original := read(tensor)) is not tensor:
        seen = _view(original, shape)
        return None if seen is None else Deferred(copy_of(seen))
    return _seen(tensor, lambda t: t.view(shape))


def _seen(tensor: Tensor, view: Callable[[Tensor], Tensor]) -> Any:
    """A view of a chain that waits."""
    recipe = recipe_of(tensor)
    seen = Seen.of(recipe) if isinstance(recipe, (Chain, Joined)) else recipe
    if not isinstance(seen, Seen) or (found := seen.then(view)) is None:
        return None
    return Deferred(found)


@rule(*named("reshape"))
def reshape(input: Tensor, *sizes: Any, **kwargs: Any) -> Any:
    wanted: Any = sizes[0] if len(sizes) == 1 else sizes
    if kwargs or input.ndim < 4 or not isinstance(wanted, (tuple, list)):
        return None
    shape = tuple(map(int, wanted))
    if shape.count(-1) == 1 and 0 not in shape:
        shape = tuple(input.numel() // -prod(shape) if size == -1 else size for size in shape)
    return _regrouped(input, shape) if prod(shape) == input.numel() else None


@rule(*named("flatten"))
def flatten(input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    if input.ndim < 5:
        return None
    first, last, shape = start_dim % input.ndim, end_dim % input.ndim, tuple(input.shape)
    return _regrouped(input, (*shape[:first], prod(shape[first : last + 1]), *shape[last + 1 :]))


@rule(*named("unflatten"))
def unflatten(input: Tensor, dim: Any, sizes: Any) -> Any:
    recipe = recipe_of(input)
    if isinstance(recipe, (Chain, Joined, Seen, Shuffled)) and input.ndim >= 5 and isinstance(dim, int):
        dim %= input.ndim
        shape = tuple(torch.empty((), device="cpu").expand(tuple(input.shape)).unflatten(dim, sizes).shape)
        return _regrouped(input, shape)
    if recipe is None or dim not in (0, -4) or input.ndim != 4 or len(sizes) != 2:
        return None
    count, steps = (int(size) for size in sizes)
    return _regrouped(input, (len(input) // steps if count == -1 else count,
                              len(input) // count if steps == -1 else steps, *input.shape[1:]))  # fmt: skip


@rule(*named("permute"))
def permute(input: Tensor, *dims: Any) -> Any:
    """Frames before channels, and back, of what waits frame by frame."""
    order = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    recipe = recipe_of(input)
    if isinstance(recipe, (Chain, Seen)):
        return _seen(input, lambda t: t.permute(order))
    if order != (0, 2, 1, 3, 4):
        return None
    if isinstance(recipe, Repeated) and (frames := recipe.as_frames()) is not None:
        return Deferred(FramesOf(frames, len(recipe.base), turned=True))
    return Deferred(replace(recipe, turned=not recipe.turned)) if isinstance(recipe, FramesOf) else None


def _regrouped(input: Tensor, shape: tuple[int, ...]) -> Any:
    """Frames of videos as pictures, and back. Pixels that are shuffled by hand come out channels last, as the
    convolutions around work."""
    recipe = recipe_of(input)
    if isinstance(recipe, FramesOf):
        return Deferred(recipe.base) if recipe.turned and shape == tuple(recipe.base.shape) else None
    if isinstance(recipe, (Chain, Upsampled)) and input.ndim == 4:
        by_frames = len(shape) == 5 and shape[0] * shape[1] == len(input) and shape[2:] == tuple(input.shape[1:])
        on_gpu = by_frames and device_type(input.device) != "cpu"
        return Deferred(FramesOf(recipe, shape[0], turned=True)) if on_gpu else None
    if device_type(input.device) != "cpu" and has_kernels(input):
        if isinstance(recipe, Shuffled):
            found = recipe.grouped(shape)
            return None if found is None else Deferred(found)
        if (found := shuffled(input, shape)) is not None:
            return Deferred(found)
        if isinstance(recipe, (Chain, Joined, Seen)) and 5 <= input.ndim < len(shape):
            return _seen(input, lambda t: t.view(shape))
    given = tuple(map(int, input.shape))
    if len(given) < 6 or len(shape) < 4 or shape[1] < _FEW_CHANNELS or not has_kernels(input):
        return None
    pictures = len(shape) < 6 and (given[0], *given[-2:]) == (shape[0], *shape[-2:])
    if given[:2] != shape[:2] and not pictures:
        return None  # Neither do positions alone become one, nor channels alone.
    source = plain(input)
    if (seen := _view(source, shape)) is not None:
        return seen
    out = torch.empty((shape[0], *shape[2:], shape[1]), dtype=source.dtype, device=source.device).movedim(-1, 1)
    if (apart := _view(out, given)) is None:
        return None
    copies.shuffle(apart, source)
    return out


_FEW_CHANNELS = 4
"""Fewer are those of a sample, with which no network goes on."""


@rule(*named("repeat_interleave"))
def repeat_interleave(input: Tensor, repeats: Any, dim: int | None = None, **kwargs: Any) -> Any:
    """Repeated channels of a channels-last picture are channels last too."""
    if kwargs.keys() - {"output_size"} or not isinstance(repeats, int) or not fits(input):
        return None
    if dim not in (1, 1 - input.ndim) or not is_dense_channels_last(source := plain(input)):
        return None
    return source.movedim(1, -1).repeat_interleave(repeats, -1).movedim(-1, 1)


@rule(Tensor.repeat)
def repeat(input: Tensor, *sizes: Any) -> Any:
    """Likewise. A repeated frame is read as often as it is asked for."""
    times: tuple[int, ...] = tuple(sizes[0]) if isinstance(sizes[0], (tuple, list)) else sizes
    if not fits(input) or len(times) != input.ndim:
        return None
    if input.ndim == 5 and input.shape[2] == 1 and times[2] > 0 and {*times[:2], *times[3:]} == {1}:
        return Deferred(Joined((plain(read(input)).expand(-1, -1, times[2], -1, -1),)))
    if times[1] == 1 or {times[0], *times[2:]} != {1}:
        return None
    if not is_dense_channels_last(source := plain(read(input))):
        return None
    return source.movedim(1, -1).repeat(*[1] * (input.ndim - 1), times[1]).movedim(-1, 1)


def _view(tensor: Tensor, shape: Sequence[int]) -> Tensor | None:
    try:
        return tensor.view(shape)
    except RuntimeError:
        return None


@rule(*named("movedim", "moveaxis"))
def movedim(input: Tensor, source: Any, destination: Any) -> Any:
    """Channels of a chain, to the end and back."""
    recipe = recipe_of(input)
    if not isinstance(recipe, Chain) or recipe.pictures or {source, destination} not in ({1, -1}, {1, input.ndim - 1}):
        return None
    return Deferred(recipe.moved(source, destination))


@rule(*named("chunk"))
def halves(tensor: Tensor, chunks: int, dim: int = 0) -> Any:
    """Of channels of tokens."""
    width = tensor.shape[-1]
    if chunks != 2 or dim != -1 or width % 2:
        return None
    sides = slice(0, width // 2), slice(width // 2, width)
    found = [part for side in sides if (part := tokens.part(tensor, side)) is not None]
    return tuple(found) or None


@rule(torch.full)
def full(size: Any, fill_value: Any, **kwargs: Any) -> Any:
    """A square of minus infinities on an accelerator, into whose rows zeros may be written."""
    shape = tuple(size) if isinstance(size, (tuple, list)) else ()
    dtype, device = kwargs.pop("dtype", None), kwargs.pop("device", None)
    if kwargs or dtype not in (torch.float32, *LOW) or device is None or fill_value != float("-inf"):
        return None
    if len(shape) != 2 or shape[0] != shape[1] or device_type(torch.device(device)) == "cpu":
        return None
    return Deferred(RowPrefixes((int(shape[0]), int(shape[1])), dtype, torch.device(device)))


@rule(Tensor.__setitem__)
def setitem(tensor: Tensor, index: Any, value: Any) -> Any:
    """`mask[row, :length] = 0`, of thousands of rows, is written down and done at once."""
    recipe = recipe_of(tensor)
    if not isinstance(recipe, RowPrefixes) or not isinstance(index, tuple) or len(index) != 2:
        return None
    row, columns = index
    fits_in = isinstance(row, int) and isinstance(columns, slice) and isinstance(value, (int, float)) and value == 0
    if not fits_in or columns.start is not None or columns.step is not None or not -recipe.size <= row < recipe.size:
        return None
    length = columns.indices(recipe.size)[1]
    recipe.lengths[row] = max(recipe.lengths[row], length)
    return tensor
