"""Tokens `[..., C]` on an accelerator: what transformers do between their products, in one pass each.

A residual is added, and its sum is normed for the next layer; a gate is applied. By themselves these are passes over
memory that take as long as the products do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.kernels.gpu import dispatch
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
        and dispatch.supports(tensor.device)
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and 0 < tensor.shape[-1] <= WIDEST
        and tensor.numel() > 0
    )


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
        return _read_by(self.tokens)


def _read_by(tensor: Tensor) -> tuple[Tensor, ...]:
    recipe = recipe_of(tensor)
    return (plain(tensor),) if recipe is None else recipe.sources


@dataclass(frozen=True)
class Scaled(_Tokens):
    """Times one factor for each channel."""

    scale: Tensor

    def compute(self) -> Tensor:
        return self.tokens * self.scale

    def added_to(self, residual: Tensor) -> Sum:
        return Sum(residual, torch.promote_types(self.dtype, residual.dtype), self.tokens, self.scale)


@dataclass(frozen=True)
class Sum(_Tokens):
    """And another tensor, times one factor for each channel."""

    other: Tensor
    scale: Tensor

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return self.tokens, self.other

    def compute(self) -> Tensor:
        total = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        dispatch.add_and_norm(self.tokens, other=self.other, scale=self.scale, total=total)
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
            dispatch.add_and_norm(pending.tokens, other=pending.other, scale=pending.scale, total=total, **norm)
            self.tokens.fulfil(total)
        else:
            dispatch.add_and_norm(plain(self.tokens), **norm)
        return normed


@dataclass(frozen=True)
class Activated(_Tokens):
    """x * sigmoid(x)."""

    def compute(self) -> Tensor:
        return F.silu(self.tokens)

    def gating(self, tokens: Tensor) -> Gated:
        return Gated(tokens, self.dtype, self.tokens)


@dataclass(frozen=True)
class Gated(_Tokens):
    """Times x * sigmoid(x) of another tensor."""

    gates: Tensor

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return self.tokens, self.gates

    def compute(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        dispatch.gate(self.tokens, self.gates, out)
        return out


def scaled(one: Any, other: Any) -> Deferred | None:
    """A product of tokens and one factor for each channel, or of tokens and their gates; None if it is neither."""
    for tokens, factor in ((one, other), (other, one)):
        recipe = recipe_of(factor)
        if isinstance(recipe, Activated):
            fits = isinstance(tokens, Tensor) and not isinstance(tokens, Deferred) and are_tokens(tokens)
            if fits and (tokens.shape, tokens.dtype) == (factor.shape, factor.dtype) and _rows_alike(tokens, recipe):
                return Deferred(recipe.gating(tokens))
        elif isinstance(factor, Tensor) and recipe is None and factor.ndim == 1 and factor.dtype in _DTYPES:
            if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[-1:] != factor.shape:
                continue
            if tokens.device == factor.device and are_tokens(tokens) and plain(tokens).is_contiguous():
                return Deferred(Scaled(plain(tokens), torch.promote_types(tokens.dtype, factor.dtype), factor))
    return None


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
            return Deferred(recipe.added_to(base))
    return None


def normed(tokens: Tensor, source: Tensor, weight: Tensor | None, eps: float) -> Deferred | None:
    """Through the root mean square over channels.

    Args:
        tokens: what is normed.
        source: the same in the dtype it had before it was cast, or itself.
        weight: `[C]`, or None.
        eps: added to the mean square.
    """
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
