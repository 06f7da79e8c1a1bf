"""The table of functions that have a faster way: one registered function for each.

A rule takes the arguments of the torch function and returns its result, or NotImplemented where the way does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.base.functions import named, registrar, writes
from halovae.kernels import group_norm as norms
from halovae.kernels.convolution import DTYPES, convolution
from halovae.kernels.fill import Fill
from halovae.kernels.gpu import dispatch
from halovae.kernels.lazy import tokens
from halovae.kernels.lazy.chain import Chain, Seen, uncut_by
from halovae.kernels.lazy.deferred import Deferred, plain, recipe_of
from halovae.kernels.lazy.joined import Joined, copy_of, parts_in, read
from halovae.kernels.lazy.masks import RowPrefixes
from halovae.kernels.lazy.upsampled import (
    FramesOf,
    Repeated,
    Upsampled,
    foldable,
    is_plain,
    joined_repeats,
    repeats_of,
    upsampled_convolution,
)
from halovae.kernels.mean_square import MeanSquare
from halovae.kernels.memory_format import is_channels_last, is_dense_channels_last, memory_format
from halovae.kernels.precision import LOW
from halovae.kernels.shapes_only import alike, device_type

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}
rule = registrar(RULES)
"""Registers a rule for torch functions."""


def fits(tensor: Any) -> bool:
    """Whether the kernels are for this tensor: a picture or video in a floating dtype, on a device that has kernels."""
    return isinstance(tensor, Tensor) and tensor.ndim in (4, 5) and _has_kernels(tensor)


def _has_kernels(tensor: Tensor) -> bool:
    if tensor.requires_grad and torch.is_grad_enabled():
        return False
    has_kernels = device_type(tensor.device) == "cpu" or dispatch.supports(tensor.device)
    return has_kernels and tensor.dtype in DTYPES and 0 not in tensor.shape


@rule(torch.conv2d, torch.conv3d)
def convolve(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Any:  # fmt: skip
    n = weight.ndim - 2
    if (
        not fits(input)
        or input.ndim != n + 2
        or groups != 1
        or isinstance(padding, str)
        or (weight.requires_grad and torch.is_grad_enabled())
        or not is_plain(weight := plain(weight))
    ):
        return NotImplemented
    if weight.dtype != input.dtype:
        return NotImplemented  # torch says what is wrong
    steps, pads, gaps = (_each(value, n) for value in (stride, padding, dilation))
    repeated = recipe_of(input)
    if isinstance(repeated, Repeated) and {*weight.shape[2:], *steps} == {1} and not any(pads):
        # What looks at one position at a time has no need to see it twice.
        return Deferred(replace(repeated, base=plain(convolution(repeated.base, weight, bias, steps, pads, gaps))))
    if n == 2 and (recipe := foldable(input, weight, steps, pads, gaps)):
        return upsampled_convolution(recipe, weight, bias)
    return convolution(input, weight, bias, steps, pads, gaps)


@rule(torch.conv_transpose2d, torch.conv_transpose3d)
def convolve_transposed(
    input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    """Groups. On a CPU channels first: torch takes many times as long for them channels last."""
    if groups == 1 or not fits(input):
        return NotImplemented
    n = input.ndim - 2
    if device_type(input.device) != "cpu":
        gaps, more = (_each(value, n) for value in (dilation, output_padding))
        apart = (*_each(stride, n),) == (*weight.shape[2:],) and not any(_each(padding, n)) and not any(more)
        if not apart or {*gaps} != {1} or groups != len(weight) or weight.shape[1] != 1 or weight.dtype != input.dtype:
            return NotImplemented
        return _stamped(plain(read(input)), weight, bias)
    if not is_channels_last(plain(input)):
        return NotImplemented
    function = (torch.conv_transpose2d, torch.conv_transpose3d)[input.ndim - 4]
    return function(plain(input).contiguous(), weight, bias, stride, padding, output_padding, groups, dilation)


def _stamped(picture: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each pixel of each channel becomes that channel's kernel times its value, side by side."""
    weight = alike(weight, picture)
    sizes, kernel = picture.shape[2:], weight.shape[2:]
    shape = (*picture.shape[:2], *(size * taps for size, taps in zip(sizes, kernel, strict=True)))
    out = torch.empty(
        shape, dtype=picture.dtype, device=picture.device, memory_format=memory_format(len(shape), channels_last=True)
    )
    pairs = [pair for both in zip(sizes, kernel, strict=True) for pair in both]
    pixels = picture.reshape(*picture.shape[:2], *(n for size in sizes for n in (size, 1)))
    stamps = weight.reshape(weight.shape[0], *(n for taps in kernel for n in (1, taps)))
    torch.mul(pixels, stamps, out=out.view(*picture.shape[:2], *pairs))
    return out if bias is None else out.add_(bias.view(-1, *[1] * len(sizes)))


def _each(value: Any, n: int) -> Sequence[int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


@rule(F.pad)
def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    amounts = {input.ndim - 1 - i // 2: (int(pad[i]), int(pad[i + 1])) for i in range(0, len(pad), 2)}
    if not fits(input) or min(map(min, amounts.values()), default=0) < 0:
        return NotImplemented
    mirrored = mode == "reflect" and device_type(input.device) != "cpu"  # on a CPU pictures go in pieces
    if mode not in ("constant", "replicate") and not mirrored:
        return NotImplemented
    if mirrored and any(max(amount) >= input.shape[dim] for dim, amount in amounts.items()):
        return NotImplemented  # torch says what is wrong
    if any(dim < 2 and amount != (0, 0) for dim, amount in amounts.items()):
        return NotImplemented
    recipe = recipe_of(input)
    fill = Fill(mode, float(value or 0.0))
    joined = recipe.padded(amounts, fill) if isinstance(recipe, Joined) else None
    joined = joined or Joined((plain(input),)).padded(amounts, fill)
    return Deferred(joined) if joined else NotImplemented


@rule(*named("cat", "concat", "concatenate"))
def cat(tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Any:
    if dim == -1 and not kwargs and (found := tokens.joined(tensors)) is not None:
        return found
    if kwargs or not isinstance(dim, int) or not all(isinstance(t, Tensor) and t.ndim == 5 for t in tensors):
        return NotImplemented
    # Nothing before a video is what networks without a causal cache join it to; torch's own would transpose it.
    parts = [t for t in tensors if t.shape[2]]
    if dim % 5 != 2 or len({t.dtype for t in tensors}) > 1 or not parts or not all(map(fits, parts)):
        return NotImplemented
    if len({(*tensor.shape[:2], *tensor.shape[3:]) for tensor in tensors}) > 1:
        return NotImplemented
    if (repeated := joined_repeats([recipe_of(t) for t in parts])) is not None:
        return Deferred(repeated)
    return Deferred(Joined(tuple(part for t in parts for part in parts_in(t))))


@rule(torch.stack)
def stack(tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Any:
    """Videos, frame by frame in turn, stay channels last."""
    first = tensors[0]
    if kwargs or dim != 3 or not all(fits(t) and t.ndim == 5 for t in tensors) or device_type(first.device) == "cpu":
        return NotImplemented
    parts = [plain(read(tensor)) for tensor in tensors]
    if not all((t.shape, t.dtype) == (first.shape, first.dtype) and is_channels_last(t) for t in parts):
        return NotImplemented
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
        return NotImplemented
    if len(index) == 2 and index[0] is ... and isinstance(index[1], slice):
        found = tokens.part(tensor, index[1])
        return NotImplemented if found is None else found
    places = tuple("whole" if place == slice(None) else place for place in index)
    places += ("whole",) * (tensor.ndim - sum(place is not None for place in places))
    if isinstance(recipe, Upsampled) and places == ("whole", "whole", None, "whole", "whole"):
        video = recipe.as_video()
        return NotImplemented if video is None else Deferred(video)
    frames = places[2] if len(places) > 2 else None
    if not isinstance(frames, slice) or {*places[:2], *places[3:]} != {"whole"}:
        return NotImplemented
    if isinstance(recipe, Repeated) and frames.indices(recipe.shape[2]) == (0, recipe.shape[2], 1):
        return Deferred(recipe)
    if not isinstance(recipe, Joined):
        return NotImplemented
    found = recipe.frames(*frames.indices(recipe.shape[2]))
    return NotImplemented if found is None else Deferred(found)


@rule(*named("clone"))
def clone(tensor: Tensor, **kwargs: Any) -> Any:
    """Of a copy that waits, and of positions that are repeated when somebody asks for them."""
    if kwargs:
        return NotImplemented
    recipe = recipe_of(tensor)
    if isinstance(recipe, Repeated):
        return Deferred(recipe)
    source = read(tensor)
    return NotImplemented if source is tensor or recipe_of(source) else source.clone()


@rule(F.interpolate)
def interpolate(
    input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *others: Any, **more: Any
) -> Any:
    if not fits(input) or mode not in ("nearest", "nearest-exact") or any(others) or any(more.values()):
        return NotImplemented
    if input.ndim == 5:
        base = plain(read(input))
        found = repeats_of(base, size, scale_factor) if device_type(input.device) != "cpu" else None
        return NotImplemented if found is None else Deferred(found)
    if scale_factor is None or size is not None or not _twice(scale_factor):
        return NotImplemented
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
        return NotImplemented
    if isinstance(tensor, Deferred):
        return tensor
    is_frames = tensor.ndim == 5 and is_dense_channels_last(tensor.transpose(1, 2))
    return Deferred(copy_of(tensor)) if is_frames or is_dense_channels_last(tensor) else NotImplemented


@rule(Tensor.view)
def view(tensor: Tensor, *sizes: Any) -> Any:
    """Frames as pictures of a batch, and back: what is to be done to them goes on waiting."""
    shape: Any = sizes[0] if len(sizes) == 1 else sizes
    if not isinstance(tensor, Deferred) or not isinstance(shape, (tuple, list)) or len(shape) not in (4, 5):
        return NotImplemented
    if (original := read(tensor)) is not tensor:
        seen = _view(original, shape)
        return NotImplemented if seen is None else Deferred(copy_of(seen))
    return _seen(tensor, lambda t: t.view(shape))


def _seen(tensor: Tensor, view: Callable[[Tensor], Tensor]) -> Any:
    """A view of a chain that waits."""
    recipe = recipe_of(tensor)
    seen = Seen.of(recipe) if isinstance(recipe, Chain) else recipe
    if not isinstance(seen, Seen) or (found := seen.then(view)) is None:
        return NotImplemented
    return Deferred(found)


@rule(*named("reshape"))
def reshape(input: Tensor, *sizes: Any, **kwargs: Any) -> Any:
    wanted: Any = sizes[0] if len(sizes) == 1 else sizes
    if kwargs or input.ndim < 4 or not isinstance(wanted, (tuple, list)):
        return NotImplemented
    shape = tuple(map(int, wanted))
    if shape.count(-1) == 1 and 0 not in shape:
        shape = tuple(input.numel() // -prod(shape) if size == -1 else size for size in shape)
    return _regrouped(input, shape) if prod(shape) == input.numel() else NotImplemented


@rule(*named("flatten"))
def flatten(input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    if input.ndim < 5:
        return NotImplemented
    first, last, shape = start_dim % input.ndim, end_dim % input.ndim, tuple(input.shape)
    return _regrouped(input, (*shape[:first], prod(shape[first : last + 1]), *shape[last + 1 :]))


@rule(*named("unflatten"))
def unflatten(input: Tensor, dim: Any, sizes: Any) -> Any:
    if recipe_of(input) is None or dim not in (0, -4) or input.ndim != 4 or len(sizes) != 2:
        return NotImplemented
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
        return NotImplemented
    if isinstance(recipe, Repeated) and (frames := recipe.as_frames()) is not None:
        return Deferred(FramesOf(frames, len(recipe.base), turned=True))
    return Deferred(replace(recipe, turned=not recipe.turned)) if isinstance(recipe, FramesOf) else NotImplemented


def _regrouped(input: Tensor, shape: tuple[int, ...]) -> Any:
    """Frames of videos as pictures, and back. Pixels that are shuffled by hand come out channels last, as the
    convolutions around work."""
    recipe = recipe_of(input)
    if isinstance(recipe, FramesOf):
        return Deferred(recipe.frames) if recipe.turned and shape == tuple(recipe.frames.shape) else NotImplemented
    if isinstance(recipe, (Chain, Upsampled)) and input.ndim == 4:
        by_frames = len(shape) == 5 and shape[0] * shape[1] == len(input) and shape[2:] == tuple(input.shape[1:])
        on_gpu = by_frames and device_type(input.device) != "cpu"
        return Deferred(FramesOf(recipe, shape[0], turned=True)) if on_gpu else NotImplemented
    given = tuple(map(int, input.shape))
    if len(given) < 6 or len(shape) < 4 or shape[1] < _FEW_CHANNELS or not _has_kernels(input):
        return NotImplemented
    pictures = len(shape) < 6 and (given[0], *given[-2:]) == (shape[0], *shape[-2:])
    if given[:2] != shape[:2] and not pictures:
        return NotImplemented  # Neither do positions alone become one, nor channels alone.
    source = plain(input)
    if (seen := _view(source, shape)) is not None:
        return seen
    out = torch.empty((shape[0], *shape[2:], shape[1]), dtype=source.dtype, device=source.device).movedim(-1, 1)
    if (apart := _view(out, given)) is None:
        return NotImplemented
    dispatch.shuffle(apart, source)
    return out


_FEW_CHANNELS = 4
"""Fewer are those of a sample, with which no network goes on."""


@rule(*named("repeat_interleave"))
def repeat_interleave(input: Tensor, repeats: Any, dim: int | None = None, **kwargs: Any) -> Any:
    """Repeated channels of a channels-last picture are channels last too."""
    if kwargs.keys() - {"output_size"} or not isinstance(repeats, int) or not fits(input):
        return NotImplemented
    if dim not in (1, 1 - input.ndim) or not is_dense_channels_last(source := plain(input)):
        return NotImplemented
    return source.movedim(1, -1).repeat_interleave(repeats, -1).movedim(-1, 1)


@rule(Tensor.repeat)
def repeat(input: Tensor, *sizes: Any) -> Any:
    """Likewise."""
    times: tuple[int, ...] = tuple(sizes[0]) if isinstance(sizes[0], (tuple, list)) else sizes
    if not fits(input) or len(times) != input.ndim or times[1] == 1 or {times[0], *times[2:]} != {1}:
        return NotImplemented
    if not is_dense_channels_last(source := plain(read(input))):
        return NotImplemented
    return source.movedim(1, -1).repeat(*[1] * (input.ndim - 1), times[1]).movedim(-1, 1)


def _view(tensor: Tensor, shape: Sequence[int]) -> Tensor | None:
    try:
        return tensor.view(shape)
    except RuntimeError:
        return None


@rule(*(f for f in named("div", "divide", "true_divide") if not writes(f) and not f.__name__.startswith("__r")))
def divide(input: Any, other: Any, **kwargs: Any) -> Any:
    """By one, as scales of residuals are, or by a root mean square."""
    root = recipe_of(other)
    if isinstance(root, MeanSquare) and not kwargs:
        return _by_rms(input, root, 0.5)
    by_one = isinstance(other, (int, float)) and other == 1 and not kwargs
    return Deferred(copy_of(input)) if by_one and fits(input) else NotImplemented


@rule(Tensor.float)
def to_float(tensor: Tensor, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _cast(tensor, torch.float32)


@rule(Tensor.to)
def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _cast(tensor, args[0]) if len(args) == 1 and not kwargs else NotImplemented


@rule(Tensor.type_as)
def type_as(tensor: Tensor, other: Tensor) -> Any:
    return _cast(tensor, other.dtype) if other.device == tensor.device else NotImplemented


def _cast(tensor: Tensor, dtype: Any) -> Any:
    """Casts between low precision and float32 become part of what stands before or behind them."""
    if isinstance(tensor, Deferred) and tensor.dtype == dtype:
        return tensor
    if isinstance(norm := recipe_of(tensor), tokens.Normed) and dtype in (torch.float32, *LOW):
        return Deferred(norm.cast(dtype))
    if not fits(tensor) or dtype not in (torch.float32, *LOW):
        return NotImplemented
    recipe = recipe_of(tensor)
    if tensor.dtype == dtype:
        return tensor
    if isinstance(recipe, (Chain, Upsampled)):
        return Deferred(recipe.cast(dtype)) if recipe.sources[0].dtype != torch.float64 else NotImplemented
    if tensor.dtype in LOW and dtype == torch.float32:
        return Deferred(Chain(plain(read(tensor)), dtype))
    return NotImplemented


@rule(*(f for f in named("pow", "square") if not writes(f) and not f.__name__.startswith("__r")))
def square(input: Any, exponent: Any = 2, **kwargs: Any) -> Any:
    if kwargs or not isinstance(exponent, (int, float)) or exponent != 2 or (chain := _chain(input)) is None:
        return NotImplemented
    return Deferred(MeanSquare(chain, input.dtype))


@rule(*named("mean"))
def mean(input: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Of squares, over channels."""
    recipe = recipe_of(input)
    dims = tuple(dim) if isinstance(dim, (list, tuple)) else (dim,)
    if not isinstance(recipe, MeanSquare) or recipe.dim is not None or kwargs or not keepdim:
        return NotImplemented
    return Deferred(recipe.mean(dims[0])) if dims in ((1,), (-1,), (input.ndim - 1,)) else NotImplemented


@rule(*(f for f in named("sqrt") if not writes(f)))
def root(input: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _raised(input, 0.5)


@rule(*(f for f in named("rsqrt") if not writes(f)))
def inverse_root(input: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _raised(input, -0.5)


def _raised(input: Any, power: float) -> Any:
    recipe = recipe_of(input)
    if not isinstance(recipe, MeanSquare) or recipe.dim is None or recipe.is_root:
        return NotImplemented
    return Deferred(recipe.raised(power))


def _by_rms(input: Any, root: MeanSquare, power: float) -> Any:
    """Times, or through, the root mean square of the same tensor."""
    chain = _chain(input)
    if chain is None or root.power != power or root.dim is None or not root.is_of(chain):
        return NotImplemented
    dtype = torch.promote_types(input.dtype, root.dtype)
    return Deferred(chain.by_rms(root.dim, root.added).cast(dtype))


@rule(*named("movedim", "moveaxis"))
def movedim(input: Tensor, source: Any, destination: Any) -> Any:
    """Channels of a chain, to the end and back."""
    recipe = recipe_of(input)
    if not isinstance(recipe, Chain) or recipe.pictures or {source, destination} not in ({1, -1}, {1, input.ndim - 1}):
        return NotImplemented
    return Deferred(recipe.moved(source, destination))


@rule(F.normalize)
def normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Tensor | None = None) -> Any:
    chain = _chain(input)
    if chain is None or p != 2 or not isinstance(dim, int) or out is not None or chain.wide != input.dtype:
        return NotImplemented
    dim %= input.ndim
    return Deferred(chain.normalized(dim, eps))


def _chain(tensor: Tensor) -> Chain | None:
    """What a chain can go on from: the chain so far, or a tensor."""
    if not fits(tensor):
        return None
    recipe = recipe_of(tensor)
    return recipe if isinstance(recipe, Chain) else Chain(plain(read(tensor)), tensor.dtype)


@rule(F.group_norm)
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    """On an accelerator: the statistics now, the scaling as a chain that goes on with what follows."""
    if not _has_kernels(input) or not norms.on_gpu(input):
        return NotImplemented
    return norms.group_norm(input, num_groups, weight, bias, eps)


@rule(*named("rms_norm"))
def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """Of tokens on an accelerator: it waits for the dtype that is asked for."""
    if tuple(normalized_shape) != tuple(input.shape[-1:]) or eps is None or not tokens.are_tokens(input):
        return NotImplemented
    recipe = recipe_of(input)
    casts_only = isinstance(recipe, Chain) and not recipe.steps and recipe.base.dtype in LOW
    found = tokens.normed(input, recipe.base if isinstance(recipe, Chain) and casts_only else input, weight, eps)
    return NotImplemented if found is None else found


@rule(F.scaled_dot_product_attention)
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    plainly = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    if not plainly or query.ndim != 4 or not _has_kernels(query) or device_type(query.device) == "cpu":
        return NotImplemented
    found = dispatch.attention(plain(query), plain(key), plain(value), scale)
    return NotImplemented if found is None else found


@rule(*(f for f in named("mul") if not f.__name__.startswith("__i") and not f.__name__.endswith("l_")))
def multiply(input: Any, other: Any, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    for combined in (tokens.scaled, tokens.weighted):
        if (found := combined(input, other)) is not None:
            return found
    for one, root in ((input, recipe_of(other)), (other, recipe_of(input))):
        if isinstance(root, MeanSquare):
            return _by_rms(one, root, -0.5)
    return _with_parameter(input, other, "times")


@rule(*(f for f in named("add") if not f.__name__.startswith("__i") and not f.__name__.endswith("d_")))
def add(input: Any, other: Any, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    recipe = recipe_of(input)
    if isinstance(recipe, MeanSquare):
        waits = recipe.dim is not None and not recipe.is_root and isinstance(other, (int, float))
        return Deferred(recipe.plus(float(other))) if waits else NotImplemented
    for combined in (tokens.summed, tokens.turned):
        if (found := combined(input, other)) is not None:
            return found
    repeated = any(isinstance(recipe_of(each), Repeated) for each in (input, other))
    summed = None if repeated else _sum(input, other)
    return _with_parameter(input, other, "plus") if summed is None else summed


def _sum(one: Any, other: Any) -> Tensor | None:
    """Two pictures on an accelerator, one of which waits for its bias: added in the same pass."""
    if not isinstance(recipe_of(one), Chain):
        one, other = other, one
    chain = recipe_of(one)
    if not isinstance(chain, Chain) or device_type(chain.device) == "cpu" or not isinstance(other, Tensor):
        return None
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return None
    if any(step.kind != "plus" for step in chain.steps):
        return None  # told before the other one is computed
    return dispatch.sum_of(chain.base, chain.dtype, chain.wide, chain.steps, plain(other))


def _with_parameter(one: Any, other: Any, how: str) -> Any:
    """Go on with a pending chain, by a number or by parameters that broadcast along the dimensions to be cut."""
    if not isinstance(recipe_of(one), Chain):
        one, other = other, one
    chain = recipe_of(one)
    repeated = recipe_of(other)
    if isinstance(chain, Chain) and isinstance(repeated, Repeated):
        fit = (repeated.shape, repeated.dtype, repeated.device) == (chain.shape, chain.dtype, chain.device)
        return Deferred(chain.with_picture(how, repeated)) if fit else NotImplemented
    if not isinstance(chain, Chain) or isinstance(other, (Deferred, bool)):
        return NotImplemented
    uncut: frozenset[int] = frozenset()
    if isinstance(other, Tensor):
        other = alike(other, chain.base)
        widens = other.ndim > 0 and torch.promote_types(one.dtype, other.dtype) != one.dtype
        if widens or other.is_complex() or other.ndim > one.ndim or other.device != one.device:
            return NotImplemented
        uncut = uncut_by(other, one.ndim)
        if len(uncut) > 1 or any(other.numel() != one.shape[dim] for dim in uncut):
            return NotImplemented
    elif not isinstance(other, (int, float)):
        return NotImplemented
    return Deferred(getattr(chain, how)(other, uncut))


@rule(*named("chunk"))
def halves(tensor: Tensor, chunks: int, dim: int = 0) -> Any:
    """Of channels of tokens."""
    width = tensor.shape[-1]
    if chunks != 2 or dim != -1 or width % 2:
        return NotImplemented
    sides = slice(0, width // 2), slice(width // 2, width)
    found = [part for side in sides if (part := tokens.part(tensor, side)) is not None]
    return tuple(found) or NotImplemented


@rule(*(f for f in named("neg", "negative") if not writes(f)))
def negate(tensor: Tensor) -> Any:
    found = tokens.negated(tensor)
    return NotImplemented if found is None else found


@rule(F.silu)
def silu(input: Tensor, inplace: bool = False) -> Any:
    """As the end of a chain; by itself it gains nothing."""
    chain = recipe_of(input)
    if inplace:
        return NotImplemented
    if isinstance(chain, FramesOf) and isinstance(chain.frames, Chain):
        return Deferred(replace(chain, frames=chain.frames.activated()))
    if isinstance(chain, (Chain, Seen)):
        return Deferred(chain.activated())
    gates = tokens.activated(input)
    return NotImplemented if gates is None else gates


@rule(torch.full)
def full(size: Any, fill_value: Any, **kwargs: Any) -> Any:
    """A square of minus infinities on an accelerator, into whose rows zeros may be written."""
    shape = tuple(size) if isinstance(size, (tuple, list)) else ()
    dtype, device = kwargs.pop("dtype", None), kwargs.pop("device", None)
    if kwargs or dtype not in (torch.float32, *LOW) or device is None or fill_value != float("-inf"):
        return NotImplemented
    if len(shape) != 2 or shape[0] != shape[1] or device_type(torch.device(device)) == "cpu":
        return NotImplemented
    return Deferred(RowPrefixes((int(shape[0]), int(shape[1])), dtype, torch.device(device)))


@rule(Tensor.__setitem__)
def setitem(tensor: Tensor, index: Any, value: Any) -> Any:
    """`mask[row, :length] = 0`, of thousands of rows, is written down and done at once."""
    recipe = recipe_of(tensor)
    if not isinstance(recipe, RowPrefixes) or not isinstance(index, tuple) or len(index) != 2:
        return NotImplemented
    row, columns = index
    fits_in = isinstance(row, int) and isinstance(columns, slice) and isinstance(value, (int, float)) and value == 0
    if not fits_in or columns.start is not None or columns.step is not None or not -recipe.size <= row < recipe.size:
        return NotImplemented
    length = columns.indices(recipe.size)[1]
    recipe.lengths[row] = max(recipe.lengths[row], length)
    return None
