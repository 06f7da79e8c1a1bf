"""A number format for each half of a VAE: the weights of a half are cast to its own, and kept once."""

from __future__ import annotations

import functools
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from halovae.base.errors import InputError
from halovae.base.options import HALVES, NETWORKS, Half
from halovae.base.private_diffusers import HOOK_OF_DIFFUSERS
from halovae.base.trees import map_tensors
from halovae.calls.state import fetches_weights

FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HalfDtypes:
    """The number format that each half of a VAE computes in.

    Which weights a half uses is read from the code of its method, and of the methods that this calls. Weights that
    neither half uses stay as they are.

    Args:
        wanted: one format for all `halves`, or by half. A half left out keeps the format that it has.
        halves: that may be cast.

    Attributes:
        by_half: the format of each half; nothing where none is asked for.

    Raises:
        InputError: no format of `FORMATS`, or weights that would need two formats; nothing was cast.
    """

    def __init__(
        self, vae: nn.Module, wanted: torch.dtype | Mapping[Half, torch.dtype] | None, halves: Iterable[str] = HALVES
    ) -> None:
        self._asked = {} if wanted is None else _checked(wanted, tuple(halves))
        self._uses = {half: _floats(vae, half) for half in HALVES} if self._asked else {}
        self._before: list[tuple[Tensor, torch.dtype]] = []
        self.by_half = self._formats()
        self._check(vae)

    def _formats(self) -> dict[str, torch.dtype]:
        own = {half: next(iter(weights.values())).dtype for half, weights in self._uses.items() if weights}
        return own | self._asked

    def _check(self, vae: nn.Module) -> None:
        name, formats = type(vae).__name__, set(self.by_half.values())
        decoded = {id(weight) for weight in self._uses.get("decode", {}).values()}
        both = [where for where, weight in self._uses.get("encode", {}).items() if id(weight) in decoded]
        if both and len(formats) > 1:
            raise InputError(f"dtype asks for {self}, but both halves of {name} use {both[0]}: give both one format")
        moving = (w for w, m in vae.named_modules() if hasattr(m, HOOK_OF_DIFFUSERS) or fetches_weights(m))
        moved = next(moving, None)
        if moved is not None and any(True for _ in self._to_cast()):
            raise InputError(
                f"dtype can't cast weights that hooks fetch or cast, as those of {moved or 'all'} in {name} are: "
                "give dtype before offloading or layerwise casting is switched on"
            )

    def _to_cast(self) -> Iterator[tuple[Tensor, torch.dtype]]:
        for half, dtype in self._asked.items():
            yield from ((weight, dtype) for weight in self._uses[half].values() if weight.dtype != dtype)

    def cast(self) -> None:
        """Cast the weights of the halves that have been asked for. They keep their place in the VAE."""
        for weight, dtype in self._to_cast():
            self._before.append((weight, weight.dtype))
            weight.data = weight.data.to(dtype)
        self.by_half = self._formats()

    def undo(self, half: str, still: Collection[str] = ()) -> None:
        """Cast the weights of a half back, but for those that halves which `still` run use too.

        What a cast to fewer bits has rounded stays rounded.
        """
        used = {id(weight) for weight in self._uses.get(half, {}).values()}
        used -= {id(weight) for other in still for weight in self._uses.get(other, {}).values()}
        before, self._before = self._before, []
        for weight, dtype in before:
            if id(weight) in used:
                weight.data = weight.data.to(dtype)
            else:
                self._before.append((weight, dtype))

    def given(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with floating-point tensors in the format of the half."""
        dtype = self.by_half.get(half)
        if dtype is None:
            return args, kwargs
        try:
            return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs))
        except InputError:  # The call itself says so, on all ranks.
            return args, kwargs

    def __str__(self) -> str:
        return ", ".join(f"{half} {str(dtype).removeprefix('torch.')}" for half, dtype in self.by_half.items())


def set_dtypes(vae: nn.Module, by_half: Mapping[Half, torch.dtype]) -> None:
    """Cast a whole VAE: each half to its own format, and what neither half uses to the widest of them.

    Raises:
        InputError: as for `HalfDtypes`.
    """
    vae.to(torch.promote_types(by_half["encode"], by_half["decode"]))
    if len(set(by_half.values())) > 1:
        HalfDtypes(vae, by_half).cast()


def _checked(wanted: object, halves: tuple[str, ...]) -> dict[str, torch.dtype]:
    by_half = cast("dict[str, object]", wanted if isinstance(wanted, Mapping) else dict.fromkeys(halves, wanted))
    for half, dtype in by_half.items():
        if half not in halves:
            raise InputError(f"a half of dtype is {half!r}: allowed are those that run, {', '.join(halves)}")
        if dtype not in FORMATS:
            allowed = ", ".join(map(str, FORMATS))
            raise InputError(f"dtype is {dtype!r}: allowed are {allowed}, or a mapping with one of them for each half")
    return cast("dict[str, torch.dtype]", dict(by_half))


def _floats(vae: nn.Module, half: str) -> dict[str, Tensor]:
    """The floating-point weights and buffers that a half uses, by name."""
    named = _names_in(type(vae), half)
    found: dict[str, Tensor] = {}
    for name, tensor in (*vae.named_parameters(), *vae.named_buffers()):
        part = name.partition(".")[0]
        if tensor.is_floating_point() and (part == NETWORKS[half] if part in NETWORKS.values() else part in named):
            found[name] = tensor
    return found


@functools.lru_cache(maxsize=64)
def _names_in(cls: type, method: str) -> frozenset[str]:
    """All attributes that a method, and the methods of its class that it names, name."""
    found: set[str] = set()
    waiting = [method]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        value = getattr(cls, name, None)
        function = value.fget if isinstance(value, property) else value
        # A decorator keeps the method that it decorates in its closure.
        kept = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        functions = [one for one in (function, *kept) if isinstance(one, types.FunctionType)]
        waiting += [named for one in functions for named in _names_of(one.__code__)]
    return frozenset(found)


def _names_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)
