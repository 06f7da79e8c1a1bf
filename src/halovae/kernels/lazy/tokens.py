"""Tokens `[..., C]` on an accelerator: what transformers do between their products, in one pass each.

A residual is added, and its sum is normed for the next layer; a gate is applied. By themselves these are passes over
memory that take as long as the products do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.kernels.gpu import support
from halovae.kernels.lazy.deferred import Deferred, plain, recipe_of
from halovae.kernels.precision import LOW

WIDEST = 1 << 13
"""Channels that one kernel holds in registers."""
_DTYPES = (torch.float32, *LOW)


def are_tokens(tensor: Any) -> bool:
    """Whether the kernels are for this tensor: dense in its last dimension, on a device that has them."""
    return (
        isinstance(tensor, Tensor)
        and tensor.ndim >= 3
        and tensor.dtype in _DTYPES
        and not tensor.is_meta
        and support.supports(tensor.device)
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and 0 < tensor.shape[-1] <= WIDEST
        and tensor.numel() > 0
    )


def _kernels() -> Any:
    from halovae.kernels.gpu import triton_tokens  # Not every device has Triton.

    return triton_tokens


@dataclass(frozen=True)
class _Tokens:
    """A recipe of the shape of its first tensor."""

    tokens: Tensor
    dtype: torch.dtype
    channels_last = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tokens.shape)

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def sources(self) -> tuple[Tensor, ...]:
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(source for value in values if isinstance(value, Tensor) for source in _read_by(value))


def _read_by(tensor: Tensor) -> tuple[Tensor, ...]:
    recipe = recipe_of(tensor)
    return (plain(tensor),) if recipe is None else recipe.sources


@dataclass(frozen=True)
class Scaled(_Tokens):
    """Times one factor for each channel."""

    scale: Tensor

    def compute(self) -> Tensor:
        return self.tokens * self.scale


@dataclass(frozen=True)
class Sum(_Tokens):
    """And another tensor, times one factor for each channel."""

    other: Tensor
    scale: Tensor

    def compute(self) -> Tensor:
        total = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        _kernels().add_and_norm(self.tokens, other=self.other, scale=self.scale, total=total)
        return total


@dataclass(frozen=True)
class Normed(_Tokens):
    """Through the root mean square over channels, times a weight. Of a sum that waits, both come from one pass."""

    weight: Tensor | None
    eps: float

    def cast(self, dtype: torch.dtype) -> Normed:
        return replace(self, dtype=dtype)

    def compute(self) -> Tensor:
        normed = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        norm: dict[str, Any] = {"normed": normed, "weight": self.weight, "eps": self.eps}
        pending = recipe_of(self.tokens)
        if isinstance(self.tokens, Deferred) and isinstance(pending, Sum):
            total = torch.empty(self.shape, dtype=pending.dtype, device=self.device)
            _kernels().add_and_norm(pending.tokens, other=pending.other, scale=pending.scale, total=total, **norm)
            self.tokens.fulfil(total)
        else:
            _kernels().add_and_norm(plain(self.tokens), **norm)
        return normed


@dataclass(frozen=True)
class Activated(_Tokens):
    """x * sigmoid(x)."""

    def compute(self) -> Tensor:
        return F.silu(self.tokens)


@dataclass(frozen=True)
class Gated(_Tokens):
    """Times x * sigmoid(x) of another tensor."""

    gates: Tensor

    def compute(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        _kernels().gate(self.tokens, self.gates, out)
        return out


@dataclass(frozen=True)
class Part(_Tokens):
    """Channels `start` to `stop` of tokens `[N, P, heads, C]`, with another sign if so."""

    start: int
    stop: int
    negative: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.tokens.shape[:-1], self.stop - self.start

    def compute(self) -> Tensor:
        part = plain(self.tokens)[..., self.start : self.stop]
        return -part if self.negative else part


@dataclass(frozen=True)
class Turned(_Tokens):
    """The first channels of tokens `[N, P, heads, C]`, with halves swapped and the first negative: a quarter turn."""

    width: int
    cosines: Tensor | None = None
    """`[N or 1, P, 1, width]`; None: not multiplied by anything yet."""
    sines: Tensor | None = None
    whole: bool = False
    """Whether the other channels follow."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tokens.shape) if self.whole else (*self.tokens.shape[:-1], self.width)

    def compute(self) -> Tensor:
        if self.whole and self.cosines is not None and self.sines is not None:
            return self._rotated(self.cosines, self.sines)
        source = plain(self.tokens)[..., : self.width]
        first, second = source.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        if self.sines is not None:
            turned = turned * self.sines
        return turned if self.cosines is None else source * self.cosines + turned

    def _rotated(self, cosines: Tensor, sines: Tensor) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        rows = (each.reshape(-1, self.width).contiguous() for each in (cosines, sines))
        angles: dict[str, Any] = dict(zip(("cosines", "sines"), rows, strict=True))
        norm = recipe_of(self.tokens)
        if isinstance(norm, Normed) and norm.dtype == self.dtype:
            _kernels().rotate(plain(norm.tokens), out, **angles, normed=True, weight=norm.weight, eps=norm.eps)
        else:
            _kernels().rotate(plain(self.tokens).contiguous(), out, **angles)
        return out


@dataclass(frozen=True)
class Weighted(_Tokens):
    """The first channels of tokens `[N, P, heads, C]` times `[N or 1, P, 1, width]`."""

    width: int
    cosines: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.tokens.shape[:-1], self.width

    def compute(self) -> Tensor:
        return plain(self.tokens)[..., : self.width] * self.cosines


def part(tokens: Tensor, places: slice) -> Deferred | None:
    """Channels of tokens that wait for their norm: they may be about to be turned. None for others."""
    recipe = recipe_of(tokens)
    start, stop, step = places.indices(tokens.shape[-1])
    if step != 1 or start >= stop:
        return None
    if isinstance(recipe, Part) and not recipe.negative:
        return Deferred(replace(recipe, start=recipe.start + start, stop=recipe.start + stop))
    if isinstance(recipe, Normed) and tokens.ndim == 4:
        return Deferred(Part(tokens, tokens.dtype, start, stop))
    return None


def negated(tokens: Any) -> Deferred | None:
    recipe = recipe_of(tokens)
    return Deferred(replace(recipe, negative=not recipe.negative)) if isinstance(recipe, Part) else None


def joined(parts: Sequence[Any]) -> Deferred | None:
    """Two parts that are a quarter turn, or what has been turned and what follows it."""
    if len(parts) != 2:
        return None
    first, second = map(recipe_of, parts)
    if isinstance(first, Turned) and isinstance(second, Part):
        follows = first.tokens is second.tokens and not second.negative and not first.whole
        if follows and (second.start, second.stop) == (first.width, first.tokens.shape[-1]):
            return Deferred(replace(first, whole=True))
    if isinstance(first, Part) and isinstance(second, Part) and first.tokens is second.tokens:
        halves = first.start == second.stop and second.start == 0 and first.stop == 2 * first.start
        if halves and first.negative and not second.negative:
            return Deferred(Turned(first.tokens, first.dtype, first.stop))
    return None


def turned(one: Any, other: Any) -> Deferred | None:
    """A product with cosines or sines, or the sum of both."""
    for tokens, factor in ((one, other), (other, one)):
        recipe, more = recipe_of(tokens), recipe_of(factor)
        if not isinstance(recipe, Turned) or not isinstance(more, Weighted):
            continue
        waits = recipe.cosines is None and recipe.sines is not None and not recipe.whole
        if waits and more.tokens is recipe.tokens and more.width == recipe.width:
            return Deferred(replace(recipe, cosines=more.cosines))
    return None


def weighted(one: Any, other: Any) -> Deferred | None:
    """Channels that are about to be turned, times the cosines or sines of their places."""
    for tokens, factor in ((one, other), (other, one)):
        recipe = recipe_of(tokens)
        if not isinstance(recipe, (Part, Turned)) or not isinstance(factor, Tensor) or recipe_of(factor) is not None:
            continue
        sizes = {(n, recipe.tokens.shape[1], 1, recipe.shape[-1]) for n in (1, len(recipe.tokens))}
        if tuple(factor.shape) not in sizes or factor.dtype != recipe.dtype:
            continue
        if isinstance(recipe, Turned) and recipe.sines is None and not recipe.whole:
            return Deferred(replace(recipe, sines=factor))
        if isinstance(recipe, Part) and recipe.start == 0 and not recipe.negative:
            return Deferred(Weighted(recipe.tokens, recipe.dtype, recipe.stop, factor))
    return None


def scaled(one: Any, other: Any) -> Deferred | None:
    """A product of tokens and one factor for each channel, or of tokens and their gates; None if it is neither."""
    for tokens, factor in ((one, other), (other, one)):
        recipe = recipe_of(factor)
        if isinstance(recipe, Activated):
            fits = isinstance(tokens, Tensor) and not isinstance(tokens, Deferred) and are_tokens(tokens)
            if fits and (tokens.shape, tokens.dtype) == (factor.shape, factor.dtype) and _rows_alike(tokens, recipe):
                return Deferred(Gated(tokens, recipe.dtype, recipe.tokens))
            continue
        fits = isinstance(tokens, Tensor) and tokens.ndim == 3 and _is_parameter(factor, tokens) and are_tokens(tokens)
        if fits and (base := plain(tokens)).is_contiguous():
            return Deferred(Scaled(base, torch.promote_types(tokens.dtype, factor.dtype), factor))
    return None


def _is_parameter(factor: Any, tokens: Tensor) -> bool:
    """Whether it has one value for each channel, as the kernels read them: dense, and without a gradient."""
    return (
        isinstance(factor, Tensor)
        and not isinstance(factor, Deferred)
        and tuple(factor.shape) == tuple(tokens.shape[-1:])
        and factor.device == tokens.device
        and factor.dtype in _DTYPES
        and factor.is_contiguous()
        and not (factor.requires_grad and torch.is_grad_enabled())
    )


def _rows_alike(tokens: Tensor, gates: Activated) -> bool:
    """Whether both step from token to token alike, and densely within one."""
    other = gates.tokens
    flat = all(tokens.stride(dim) == tokens.stride(dim + 1) * tokens.shape[dim + 1] for dim in range(tokens.ndim - 2))
    return flat and tokens.stride() == other.stride() and tokens.stride(-1) == 1


def summed(one: Any, other: Any) -> Deferred | None:
    """Tokens and the scaled tokens of a layer; None if they are something else."""
    for residual, layer in ((one, other), (other, one)):
        recipe = recipe_of(layer)
        fits = isinstance(recipe, Scaled) and are_tokens(residual) and tuple(residual.shape) == recipe.shape
        if isinstance(recipe, Scaled) and fits and (base := plain(residual)).is_contiguous():
            return Deferred(Sum(base, torch.promote_types(recipe.dtype, base.dtype), recipe.tokens, recipe.scale))
    return None


def normed(tokens: Tensor, source: Tensor, weight: Tensor | None, eps: float) -> Deferred | None:
    """Through the root mean square over channels.

    Args:
        tokens: what is normed.
        source: the same in the dtype it had before it was cast, or itself.
        weight: `[C]`, or None.
        eps: added to the mean square.
    """
    if weight is not None and not _is_parameter(weight, tokens):
        return None
    dense = isinstance(recipe_of(source), Sum) or plain(source).is_contiguous()
    if not dense or not are_tokens(source):
        return None
    kept = source if isinstance(recipe_of(source), Sum) else plain(source)
    return Deferred(Normed(kept, tokens.dtype, weight, eps))


def activated(tokens: Tensor) -> Deferred | None:
    """Gates that wait for what they gate; None where they are no tokens."""
    if tokens.ndim != 3 or isinstance(tokens, Deferred) or not are_tokens(tokens) or tokens.stride(-1) != 1:
        return None
    return Deferred(Activated(tokens, tokens.dtype))
