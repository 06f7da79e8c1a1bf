"""The function mode that runs a network with the kernels of this package. It sees every torch call, and knows no model.

It composes with other function modes: entered first, it receives what they call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from halovae.base.functions import QUESTIONS, named, writes
from halovae.kernels import autocast, fast_arithmetic, fast_views
from halovae.kernels.fast_rules import RULES
from halovae.kernels.kept import end_call
from halovae.kernels.lazy.deferred import computed, settle
from halovae.kernels.lazy.joined import read

RULE_MODULES = fast_arithmetic, fast_views
"""Imported for their rules."""

ANSWERED = QUESTIONS | {Tensor.size, Tensor.numel, Tensor.nelement, getattr(Tensor, "shape").__get__}  # noqa: B009
"""What a deferred tensor answers without being computed."""

READS = {F.group_norm, *(f for f in named("add", "sub", "mul") if not writes(f))}
"""Functions that write none of their arguments and give memory of their own."""


class FastMode(TorchFunctionMode):
    """Within it, torch functions may be computed later, together, or by other kernels: same numbers up to rounding.

    Results may be deferred and lie channels-last in memory: `finished` gives ordinary ones.
    """

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        end_call()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ANSWERED:
            return func(*args, **kwargs)
        if autocast.is_on():
            return autocast.run_cast(self._run, func, args, kwargs)
        return self._run(func, args, kwargs)

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = RULES.get(func)
        if rule and (result := rule(*args, **kwargs)) is not None:
            return result
        if func in READS:
            args = tuple(map(read, args))
        return _run_computed(func, computed(args), computed(kwargs))


def _run_computed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for written in _written(func, args, kwargs):
        settle(written)
    try:
        return func(*args, **kwargs)
    except RuntimeError:
        # A view that works channels-first, of a tensor that these kernels made channels-last.
        if func is not Tensor.view or not isinstance(args[0], Tensor):
            raise
        return args[0].contiguous().view(*args[1:], **kwargs)


def _written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call writes into."""
    named = writes(func) or func is Tensor.__setitem__
    in_place = named or kwargs.get("inplace") is True or any(arg is True for arg in args[1:])
    if not in_place and "out" not in kwargs:
        return []
    places = [*(args[:1] if in_place else ()), kwargs.get("out")]
    flat = [t for place in places for t in (place if isinstance(place, (list, tuple)) else (place,))]
    return [t for t in flat if isinstance(t, Tensor)]


def finished(tensor: Tensor) -> Tensor:
    """The tensor as the network by itself would have made it: computed, and contiguous."""
    tensor = computed(tensor)
    return tensor if tensor.ndim not in (4, 5) else tensor.contiguous(memory_format=torch.contiguous_format)
