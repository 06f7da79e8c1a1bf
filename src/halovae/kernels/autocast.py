"""torch.autocast as casts that modes can see.

torch casts the arguments of some functions behind the place where modes see the call. A kernel that stands in for a
function would miss that, and so would tensors of the meta device. Here arguments are cast first, and the function runs
without autocast. For which functions, and to what, differs by device and by version: torch is asked, on fake tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from halovae.base.functions import outside_modes
from halovae.base.private_torch import FAKE_LOGGER, FakeTensorMode, TorchDispatchMode, without_modes
from halovae.base.private_torch import autocast_is_on as is_on
from halovae.base.trees import mapped, tensors_of
from halovae.kernels.kept import derived
from halovae.kernels.shapes_only import alike, device_type

Run = Callable[..., Any]
_known: dict[Hashable, torch.dtype | None] = {}


def state() -> tuple[tuple[str, torch.dtype], ...]:
    """The types of devices for which autocast is on, and to which dtype it casts."""
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _kinds_on())


def dtype_of(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on a device, or on the one that it stands for; None where it is off."""
    kind = device_type(device)
    return torch.get_autocast_dtype(kind) if is_on() and kind in _kinds_on() else None


@contextmanager
def off() -> Iterator[None]:
    """Within it, autocast is off."""
    kinds = _kinds_on()
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in kinds:
            torch.set_autocast_enabled(kind, True)


def _kinds_on() -> list[str]:
    if not is_on():
        return []
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu", *([accelerator.type] if accelerator else [])]
    return [kind for kind in kinds if torch.is_autocast_enabled(kind)]


def run_cast(run: Run, func: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function as autocast would, by a `run` that knows nothing of it.

    Args:
        run: runs torch functions, given with their arguments and a dict of keyword arguments.
    """
    tensors = [tensor for tensor in tensors_of((args, kwargs)) if tensor.is_floating_point()]
    picture = next((tensor for tensor in tensors if tensor.is_meta), tensors[0] if tensors else None)
    low = None if picture is None else dtype_of(picture.device)
    to = None if picture is None or low is None else _casts_to(func, args, kwargs, tensors, device_type(picture.device))
    with off():
        if to is None or picture is None:
            return run(func, args, kwargs)

        def cast(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype in (to, torch.float64):
                return tensor
            if isinstance(tensor, torch.nn.Parameter):
                weight = alike(tensor, picture)
                return derived(weight, ("cast", to), outside_modes(lambda: weight.to(to)))
            return run(Tensor.to, (tensor, to), {})

        return run(func, mapped(cast, args), mapped(cast, kwargs))


def _casts_to(
    func: Run, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], kind: str
) -> torch.dtype | None:
    """What autocast casts the arguments of a function to; None where it leaves them."""
    asked = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
    low = torch.get_autocast_dtype(kind)
    key = func, kind, low, len(args), *kwargs, *(tensor.dtype for tensor in tensors), *asked
    if key not in _known:
        own, all_casts = (_Casts(kind, low, cast).of(func, args, kwargs) for cast in (False, True))
        _known[key] = all_casts[0] if len(all_casts) > len(own) else None
    return _known[key]


class _Casts(TorchDispatchMode):
    """Notes the dtypes that operators of a function on fake tensors are cast to, with autocast or without."""

    def __init__(self, kind: str, low: torch.dtype, cast: bool) -> None:
        super().__init__()
        self._kind, self._low, self._cast = kind, low, cast
        self._seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and "dtype" in kwargs:
            self._seen.append(kwargs["dtype"])
        return func(*args, **kwargs)

    @outside_modes
    def of(self, func: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.dtype]:
        """A function that can't run on these shapes, as on a shard without halo, has been cast before it says so."""

        def fake(leaf: Any) -> Any:
            is_tensor = isinstance(leaf, Tensor)
            return torch.empty(tuple(leaf.shape), dtype=leaf.dtype, device=self._kind) if is_tensor else leaf

        with without_modes(), FakeTensorMode(), off(), suppress(Exception), _silent():
            args, kwargs = mapped(fake, args), mapped(fake, kwargs)
            with torch.autocast(self._kind, self._low, enabled=self._cast), self:
                func(*args, **kwargs)
        return self._seen


@contextmanager
def _silent() -> Iterator[None]:
    """Within it, torch does not log what fake tensors can't do."""
    logger = logging.getLogger(FAKE_LOGGER)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class Autocast(TorchFunctionMode):
    """Within it, functions of tensors of the meta device are cast as on the device that these stand for."""

    def __torch_function__(
        self, func: Run, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return run_cast(self.run, func, args, kwargs) if is_on() else self.run(func, args, kwargs)

    def run(self, func: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)
