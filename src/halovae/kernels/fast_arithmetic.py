"""Rules for what is calculated: convolutions, norms, attention, and functions of each position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.base.functions import named, writes
from halovae.kernels import group_norm as norms
from halovae.kernels.convolution import convolution
from halovae.kernels.fast_rules import fits, has_kernels, rule
from halovae.kernels.gpu import fused
from halovae.kernels.lazy import shuffled, tokens
from halovae.kernels.lazy.chain import Chain, MeanSquare, Seen, Step, varies_along
from halovae.kernels.lazy.deferred import Deferred, plain, recipe_of
from halovae.kernels.lazy.joined import copy_of, read
from halovae.kernels.lazy.shuffled import Shuffled
from halovae.kernels.lazy.upsampled import (
    FramesOf,
    Repeated,
    Upsampled,
    foldable,
    is_plain,
    upsampled_convolution,
)
from halovae.kernels.memory_format import is_channels_last, memory_format
from halovae.kernels.precision import LOW
from halovae.kernels.shapes_only import alike, device_type


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
        return None
    fitting = weight.dtype == input.dtype and weight.shape[1] == input.shape[1]
    if not fitting or (bias is not None and tuple(bias.shape) != (len(weight),)):
        return None  # torch says what is wrong
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
        return None
    n = input.ndim - 2
    if device_type(input.device) != "cpu":
        gaps, more = (_each(value, n) for value in (dilation, output_padding))
        apart = (*_each(stride, n),) == (*weight.shape[2:],) and not any(_each(padding, n)) and not any(more)
        if not apart or {*gaps} != {1} or groups != len(weight) or weight.shape[1] != 1 or weight.dtype != input.dtype:
            return None
        return _stamped(plain(read(input)), weight, bias)
    if not is_channels_last(plain(input)):
        return None
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


@rule(*(f for f in named("div", "divide", "true_divide") if not writes(f) and not f.__name__.startswith("__r")))
def divide(input: Any, other: Any, **kwargs: Any) -> Any:
    """By one, as scales of residuals are, or by a root mean square."""
    root = recipe_of(other)
    if isinstance(root, MeanSquare) and not kwargs:
        return _by_rms(input, root, 0.5)
    by_one = isinstance(other, (int, float)) and other == 1 and not kwargs
    return Deferred(copy_of(input)) if by_one and fits(input) else None


@rule(Tensor.float)
def to_float(tensor: Tensor, **kwargs: Any) -> Any:
    return None if kwargs else _cast(tensor, torch.float32)


@rule(Tensor.to)
def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _cast(tensor, args[0]) if len(args) == 1 and not kwargs else None


@rule(Tensor.type_as)
def type_as(tensor: Tensor, other: Tensor) -> Any:
    return _cast(tensor, other.dtype) if other.device == tensor.device else None


def _cast(tensor: Tensor, dtype: Any) -> Any:
    """Casts between low precision and float32 become part of what stands before or behind them."""
    if isinstance(tensor, Deferred) and tensor.dtype == dtype:
        return tensor
    if isinstance(norm := recipe_of(tensor), tokens.Normed) and dtype in (torch.float32, *LOW):
        return Deferred(norm.cast(dtype))
    if not fits(tensor) or dtype not in (torch.float32, *LOW):
        return None
    recipe = recipe_of(tensor)
    if tensor.dtype == dtype:
        return tensor
    if isinstance(recipe, (Chain, Upsampled)):
        return Deferred(recipe.cast(dtype)) if recipe.sources[0].dtype != torch.float64 else None
    if tensor.dtype in LOW and dtype == torch.float32:
        return Deferred(Chain(plain(read(tensor)), dtype))
    return None


@rule(*(f for f in named("pow", "square") if not writes(f) and not f.__name__.startswith("__r")))
def square(input: Any, exponent: Any = 2, **kwargs: Any) -> Any:
    if kwargs or not isinstance(exponent, (int, float)) or exponent != 2 or (chain := _chain(input)) is None:
        return None
    return Deferred(MeanSquare(chain, input.dtype))


@rule(*named("mean"))
def mean(input: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Of squares, over channels; of pixels that became channels, over groups of these."""
    recipe = recipe_of(input)
    dims = tuple(dim) if isinstance(dim, (list, tuple)) else (dim,)
    if any(value is not None for value in kwargs.values()):
        return None
    if isinstance(recipe, Shuffled) and not keepdim and len(dims) == 1 and isinstance(dims[0], int):
        found = recipe.mean(dims[0] % input.ndim)
        return None if found is None else Deferred(found)
    if not isinstance(recipe, MeanSquare) or recipe.dim is not None or not keepdim:
        return None
    return Deferred(replace(recipe, dim=dims[0] % input.ndim)) if dims in ((1,), (-1,), (input.ndim - 1,)) else None


@rule(*(f for f in named("sqrt") if not writes(f)))
def root(input: Any, **kwargs: Any) -> Any:
    return None if kwargs else _raised(input, 0.5)


@rule(*(f for f in named("rsqrt") if not writes(f)))
def inverse_root(input: Any, **kwargs: Any) -> Any:
    return None if kwargs else _raised(input, -0.5)


def _raised(input: Any, power: float) -> Any:
    recipe = recipe_of(input)
    if not isinstance(recipe, MeanSquare) or recipe.dim is None or recipe.is_root:
        return None
    return Deferred(replace(recipe, power=power))


def _by_rms(input: Any, root: MeanSquare, power: float) -> Any:
    """Times, or through, the root mean square of the same tensor."""
    chain = _chain(input)
    if chain is None or root.power != power or root.dim is None or not root.is_of(chain):
        return None
    dtype = torch.promote_types(input.dtype, root.dtype)
    return Deferred(chain.by_rms(root.dim, root.added).cast(dtype))


@rule(F.normalize)
def normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Tensor | None = None) -> Any:
    chain = _chain(input)
    if chain is None or p != 2 or not isinstance(dim, int) or out is not None or chain.wide != input.dtype:
        return None
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
    if not has_kernels(input) or not norms.on_gpu(input):
        return None
    channels = input.shape[1]
    if channels % num_groups or any(tuple(p.shape) != (channels,) for p in (weight, bias) if p is not None):
        return None  # torch says what is wrong
    return norms.group_norm(input, num_groups, weight, bias, eps)


@rule(*named("rms_norm"))
def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """Of tokens on an accelerator: it waits for the dtype that is asked for."""
    if tuple(normalized_shape) != tuple(input.shape[-1:]) or eps is None or not tokens.are_tokens(input):
        return None
    recipe = recipe_of(input)
    casts_only = isinstance(recipe, Chain) and not recipe.steps and recipe.base.dtype in LOW
    return tokens.normed(input, recipe.base if isinstance(recipe, Chain) and casts_only else input, weight, eps)


@rule(F.scaled_dot_product_attention)
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    plainly = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    if not plainly or query.ndim != 4 or not has_kernels(query) or device_type(query.device) == "cpu":
        return None
    return fused.attention(plain(query), plain(key), plain(value), scale)


@rule(*(f for f in named("mul") if not f.__name__.startswith("__i") and not f.__name__.endswith("l_")))
def multiply(input: Any, other: Any, **kwargs: Any) -> Any:
    if kwargs:
        return None
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
        return None
    recipe = recipe_of(input)
    if isinstance(recipe, MeanSquare):
        waits = recipe.dim is not None and not recipe.is_root and isinstance(other, (int, float))
        return Deferred(replace(recipe, added=recipe.added + other)) if waits else None
    for combined in (tokens.summed, tokens.turned, shuffled.summed):
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
    steps, second = chain.steps, recipe_of(other)
    if isinstance(second, Chain) and second.dtype == second.base.dtype and len(second.steps) == len(steps) == 1:
        biases = steps[0].value, second.steps[0].value
        if second.steps[0].kind == "plus" and all(isinstance(bias, Tensor) for bias in biases):
            steps, other = (Step("plus", sum(biases)),), second.base
    return fused.sum_of(chain.base, chain.dtype, chain.wide, steps, plain(other))


def _with_parameter(one: Any, other: Any, how: str) -> Any:
    """Go on with a pending chain, by a number or by parameters that vary along one dimension."""
    if not isinstance(recipe_of(one), Chain):
        one, other = other, one
    chain = recipe_of(one)
    repeated = recipe_of(other)
    if isinstance(chain, Chain) and isinstance(repeated, Repeated):
        fit = (repeated.shape, repeated.dtype, repeated.device) == (chain.shape, chain.dtype, chain.device)
        return Deferred(chain.with_picture(how, repeated)) if fit else None
    if not isinstance(chain, Chain) or isinstance(other, (Deferred, bool)):
        return None
    if isinstance(other, Tensor):
        other = alike(other, chain.base)
        widens = other.ndim > 0 and torch.promote_types(one.dtype, other.dtype) != one.dtype
        if widens or other.is_complex() or other.ndim > one.ndim or other.device != one.device:
            return None
        along = varies_along(other, one.ndim)
        if len(along) > 1 or any(other.numel() != one.shape[dim] for dim in along):
            return None
    elif not isinstance(other, (int, float)):
        return None
    return Deferred(getattr(chain, how)(other))


@rule(*(f for f in named("neg", "negative") if not writes(f)))
def negate(tensor: Tensor) -> Any:
    return tokens.negated(tensor)


@rule(F.dropout)
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """What drops nothing lets what waits go on waiting."""
    return input if isinstance(input, Deferred) and not training else None


@rule(F.silu)
def silu(input: Tensor, inplace: bool = False) -> Any:
    """As the end of a chain; by itself it gains nothing."""
    chain = recipe_of(input)
    if inplace:
        return None
    if isinstance(chain, FramesOf) and isinstance(chain.base, Chain):
        return Deferred(replace(chain, base=chain.base.activated()))
    if isinstance(chain, (Chain, Seen)):
        found = chain.activated()
        return None if found is None else Deferred(found)
    return tokens.activated(input)
