"""Chains of functions that act on each position by itself, run in one memory, or by one kernel.

Norms over channels, scales, shifts, activations and casts, as VAEs write them: one function after the other. In low
precision the chain runs in float32 and is rounded once, at its end, which is nearer to the truth than rounding after
each function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.kernels.gpu import fused
from halovae.kernels.lazy.deferred import OfBase, Recipe
from halovae.kernels.memory_format import is_channels_last, is_dense_channels_last, memory_format, memory_of, strides_of
from halovae.kernels.precision import LOW
from halovae.kernels.shapes_only import device_type


@dataclass(frozen=True)
class Step:
    """One function of a chain."""

    kind: str
    """"normalize", "rms", "times", "plus", "times picture", "plus picture" or "silu"."""
    value: Any = None
    """(dim, least length); (dim, added to the mean square); the factor; the term; either as a recipe; nothing."""

    def run(self, piece: Tensor) -> None:
        """Write the result into the argument."""
        if self.kind == "normalize":
            dim, least = self.value
            piece.div_(torch.linalg.vector_norm(piece, dim=dim, keepdim=True).clamp_min_(least))
        elif self.kind == "rms":
            dim, added = self.value
            piece.mul_(piece.square().mean(dim, keepdim=True).add_(added).rsqrt_())
        elif self.kind == "times":
            piece.mul_(self.value)
        elif self.kind == "plus":
            piece.add_(self.value)
        elif self.kind == "times picture":
            piece.mul_(self.value.compute())
        elif self.kind == "plus picture":
            piece.add_(self.value.compute())
        else:
            F.silu(piece, inplace=True)

    def along(self, ndim: int) -> frozenset[int]:
        """The dimensions along which it looks at several positions, or has parameters."""
        if self.kind in ("normalize", "rms"):
            return frozenset((self.value[0],))
        return varies_along(self.value, ndim) if isinstance(self.value, Tensor) else frozenset()

    def moved(self, ndim: int, source: int, destination: int) -> Step:
        """The same of a tensor one of whose dimensions is moved."""
        if self.kind in ("normalize", "rms"):
            dim, number = self.value
            return Step(self.kind, (_moved(ndim, source, destination).index(dim), number))
        if isinstance(self.value, Tensor) and self.value.ndim:
            whole = self.value.reshape(*[1] * (ndim - self.value.ndim), *self.value.shape)
            return Step(self.kind, whole.movedim(source, destination))
        return self


def _moved(ndim: int, source: int, destination: int) -> list[int]:
    """Which dimension stands where after one has been moved."""
    order = [dim for dim in range(ndim) if dim != source % ndim]
    order.insert(destination % ndim, source % ndim)
    return order


@dataclass(frozen=True)
class Chain(OfBase):
    """Functions of `base`, one after the other; a recipe."""

    base: Tensor
    dtype: torch.dtype
    steps: tuple[Step, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def sources(self) -> tuple[Tensor, ...]:
        values = (s.value for s in self.steps if isinstance(s.value, Tensor))
        return (self.base, *values, *(source for picture in self.pictures for source in picture.sources))

    @property
    def pictures(self) -> tuple[Recipe, ...]:
        """Factors and terms that differ from position to position."""
        return tuple(step.value for step in self.steps if step.kind.endswith("picture"))

    @property
    def wide(self) -> torch.dtype:
        """The dtype it is calculated in."""
        return torch.float32 if self.base.dtype in LOW else self.base.dtype

    def cast(self, dtype: torch.dtype) -> Chain:
        return Chain(self.base, dtype, self.steps)

    def normalized(self, dim: int, least: float) -> Chain:
        """Divide by the Euclidean length over one dimension, or by `least` where that is more."""
        return self._then(Step("normalize", (dim, least)))

    def by_rms(self, dim: int, added: float) -> Chain:
        """Divide by the root of (the mean square over one dimension + `added`)."""
        return self._then(Step("rms", (dim, added)))

    def moved(self, source: int, destination: int) -> Chain:
        """The same of the tensor with one dimension moved."""
        steps = tuple(step.moved(self.base.ndim, source, destination) for step in self.steps)
        return Chain(self.base.movedim(source, destination), self.dtype, steps)

    def activated(self) -> Chain:
        """x * sigmoid(x)."""
        return self._then(Step("silu"))

    def times(self, factor: Tensor | float) -> Chain:
        """Multiply; factors that follow each other become one."""
        factor, steps = self._widened(factor), self.steps
        if steps and steps[-1].kind == "times":
            factor, steps = factor * steps[-1].value, steps[:-1]
        return Chain(self.base, self.dtype, (*steps, Step("times", factor)))

    def plus(self, term: Tensor | float) -> Chain:
        if not isinstance(term, Tensor) and term == 0:
            return self
        return self._then(Step("plus", self._widened(term)))

    def with_picture(self, how: str, picture: Recipe) -> Chain:
        """Multiply ("times") by, or add ("plus"), another picture of this shape. On accelerators only."""
        return self._then(Step(f"{how} picture", picture))

    def _then(self, step: Step) -> Chain:
        return Chain(self.base, self.dtype, (*self.steps, step))

    def _widened(self, parameter: Any) -> Any:
        return parameter.to(self.wide) if isinstance(parameter, Tensor) else parameter

    def compute(self) -> Tensor:
        if device_type(self.device) == "cpu":
            return fused.step_by_step(self.base, self.dtype, self.wide, self.steps)
        last = self.base.ndim - 1
        along = {dim for step in self.steps for dim in step.along(last + 1)}
        if along == {last} and not self.pictures:  # channels that are last in shape too
            return self.moved(-1, 1).compute().movedim(1, -1)
        return fused.chain(self.base, self.dtype, self.wide, self.steps)


@dataclass(frozen=True)
class Seen:
    """A view of what a chain, or a join, gives; a recipe. What is done to each position can still join the chain."""

    chain: Recipe
    views: tuple[Callable[[Tensor], Tensor], ...]
    example: Tensor
    """On the meta device: its shape and strides."""

    @classmethod
    def of(cls, chain: Recipe) -> Seen:
        strides = strides_of(chain.shape, chain.channels_last)
        return cls(chain, (), torch.empty_strided(chain.shape, strides, dtype=chain.dtype, device="meta"))

    def then(self, view: Callable[[Tensor], Tensor]) -> Seen | None:
        """Seen in another way; None where that takes a copy."""
        try:
            return Seen(self.chain, (*self.views, view), view(self.example))
        except RuntimeError:
            return None

    def activated(self) -> Seen | None:
        """x * sigmoid(x); None of a join."""
        return Seen(self.chain.activated(), self.views, self.example) if isinstance(self.chain, Chain) else None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.example.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.chain.dtype

    @property
    def device(self) -> torch.device:
        return self.chain.device

    @property
    def channels_last(self) -> bool:
        return is_channels_last(self.example)

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return self.chain.sources

    def compute(self) -> Tensor:
        chain = self.chain
        in_order = isinstance(chain, Chain) and chain.channels_last and is_dense_channels_last(self.example)
        if isinstance(chain, Chain) and in_order and device_type(chain.device) != "cpu":
            return fused.chain(chain.base, chain.dtype, chain.wide, chain.steps, self.shape)
        tensor = chain.compute()
        if not isinstance(self.chain, Chain):  # in the order that the views were tried on
            tensor = tensor.contiguous(memory_format=memory_format(tensor.ndim, self.chain.channels_last))
        for view in self.views:
            tensor = view(tensor)
        return tensor


def varies_along(parameter: Tensor, ndim: int) -> frozenset[int]:
    """The dimensions along which a broadcast parameter varies."""
    return frozenset(ndim - 1 - i for i, size in enumerate(reversed(parameter.shape)) if size > 1)


# ---- the root mean square over channels, as networks write it out: each function waits for the next one, and the
# division by the root becomes one step of a chain


@dataclass(frozen=True)
class MeanSquare(OfBase):
    """Something on the way from a tensor to its root mean square; a recipe."""

    base: Chain
    """What is squared."""
    dtype: torch.dtype
    dim: int | None = None
    """The mean over it is taken; None: not yet."""
    added: float = 0.0
    power: float = 1.0
    """1: the mean square; 0.5: its root; -0.5: one over the root."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(1 if dim == self.dim else size for dim, size in enumerate(self.base.shape))

    @property
    def channels_last(self) -> bool:
        return self.dim is None and self.base.channels_last

    @property
    def is_root(self) -> bool:
        return self.power != 1.0

    def is_of(self, chain: Chain) -> bool:
        """Whether it is the root mean square of the very tensor that a chain makes."""
        return chain.steps is self.base.steps and _is_same(chain.base, self.base.base)

    def compute(self) -> Tensor:
        tensor = self.base.cast(self.dtype).compute() if self.base.steps else self.base.base.to(self.dtype)
        value = tensor.square()
        if self.dim is None:
            return value
        value = value.mean(self.dim, keepdim=True)
        if self.added:
            value = value + self.added
        return value if self.power == 1.0 else value.sqrt() if self.power == 0.5 else value.rsqrt()


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one is other or (
        memory_of(one) == memory_of(other)
        and (one.dtype, one.shape, one.stride(), one.storage_offset())
        == (other.dtype, other.shape, other.stride(), other.storage_offset())
    )
