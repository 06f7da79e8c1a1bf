"""What is known of torch's functions by themselves: their spellings, which ones write, which only ask."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.base.private_torch import without_functions

Implementation = TypeVar("Implementation", bound=Callable[..., Any])


def named(*names: str) -> Iterator[Any]:
    """Every torch function of these names: `torch.x`, `torch.nn.functional.x`, `Tensor.x`, `Tensor.x_`, `Tensor.__x__`.

    Raises:
        AttributeError: torch has nothing of that name.
    """
    for name in names:
        spellings = [(torch, name), (F, name), (torch.special, name)]
        spellings += [(Tensor, s) for s in (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__")]
        found = {getattr(place, spelling) for place, spelling in spellings if hasattr(place, spelling)}
        if not found:
            raise AttributeError(f"torch has no function named {name!r}")
        yield from found


@functools.cache
def writes(function: Callable[..., Any]) -> bool:
    """Whether a torch function writes into its first operand: `x.add_(y)`, `x += y`."""
    name = getattr(function, "__name__", "")
    if name.startswith("__"):
        return name.startswith("__i") and name != "__invert__"
    return name.endswith("_")


def registrar(table: dict[Any, Callable[..., Any]]) -> Callable[..., Callable[[Implementation], Implementation]]:
    """A decorator that enters an implementation into `table` for the torch functions it is given.

    A second implementation for the same function is a mistake and raises ValueError.
    """

    def decorator(*functions: Any) -> Callable[[Implementation], Implementation]:
        def register(implementation: Implementation) -> Implementation:
            for function in dict.fromkeys(functions):
                if function in table:
                    raise ValueError(f"{function} has a rule already: {table[function]}")
                table[function] = implementation
            return implementation

        return register

    return decorator


Result = TypeVar("Result")


def outside_modes(function: Callable[..., Result]) -> Callable[..., Result]:
    """A function whose own torch calls no function mode sees: it moves shards while a network runs."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Result:
        with without_functions():
            return function(*args, **kwargs)

    return wrapped


SIZE_QUESTIONS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "nbytes")),
    Tensor.size, Tensor.__len__, Tensor.numel, Tensor.nelement, torch.numel, Tensor.stride,
}  # fmt: skip
"""Questions about the sizes of a tensor."""
QUESTIONS = {
    getattr(Tensor, name).__get__
    for name in ("dtype", "device", "ndim", "requires_grad", "layout", "grad", "grad_fn", "is_leaf",
                 "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "itemsize", "nbytes")
} | {
    Tensor.dim, Tensor.stride, Tensor.is_contiguous, Tensor.element_size,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__, Tensor.data_ptr, Tensor.get_device,
    Tensor.is_inference, Tensor.__hash__, Tensor.is_pinned, torch.is_floating_point, torch.is_complex,
}  # fmt: skip
"""Questions about a tensor that every shard answers for itself."""
