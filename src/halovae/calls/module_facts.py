"""A network's modules as every call asks for them: looked through again only where something has changed.

A VAE has some hundred modules with some dozen attributes each. Python takes milliseconds to go through them, as long as
an accelerator takes for a picture.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from halovae.base.private_diffusers import LIBRARY_HOOKS
from halovae.base.private_torch import BUFFERS, CONVOLUTION_PADDING, registered, tables

NO_STATE = frozenset(vars(nn.Module())) - {"training", BUFFERS} | {CONVOLUTION_PADDING, *LIBRARY_HOOKS}
"""Attributes of modules that are no state: what torch keeps itself, and the hooks of libraries that move weights, which
know where the weights are."""

PLAIN = frozenset((bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size, nn.Parameter))
"""Types that hold nothing which could change."""

TELLING = (bool, int, float, str)
"""Types of values that say all about themselves."""


class Contents:
    """The values in some tables; tells at a glance whether the very same ones are still there."""

    def __init__(self, tables: Sequence[Mapping[str, Any]]) -> None:
        self.tables = tables
        self._sizes = [*map(len, tables)]
        self._values = [value for table in tables for value in table.values()]

    def holds(self) -> bool:
        now = chain.from_iterable([table.values() for table in self.tables])
        return [*map(len, self.tables)] == self._sizes and all(map(operator.is_, now, self._values))


class ModuleFact:
    """One module as it was when this was made.

    Args:
        restless: whether it is looked at anew in each call.

    Attributes:
        attributes: of the module.
        state: those of their values that may hold something which changes.
        anew: whether it is looked at anew in each call: it is restless, or keeps what is not to be held on to.
        contents: what has to stay the same.
    """

    def __init__(self, module: nn.Module, restless: bool = False) -> None:
        self.module, self.attributes = module, dict(vars(module))
        self.state = [
            value
            for name, value in self.attributes.items()
            # Nearly all are plain: told apart here, they cost least.
            if type(value) not in PLAIN and name not in NO_STATE and (name != BUFFERS or value) and not _is_fixed(value)
        ]
        self.anew = restless or any(map(_holds_more, self.state))
        self.contents = Contents(tables(module)[: 1 if self.anew else None])

    @functools.cached_property
    def reading(self) -> tuple[list[Tensor], tuple[Any, ...]]:
        """Its tensors, parameters and buffers among them; and what says all about the rest that a call depends on."""
        tensors: list[Tensor] = []
        told: list[Any] = [id(self.module)]
        for values in (*registered(self.module), self.attributes):
            # By name: an attribute that was away for a while stands in another place.
            for name in sorted(values):
                value = values[name]
                if isinstance(value, Tensor):
                    tensors.append(value)
                    told.append(name)
                elif isinstance(value, TELLING):
                    told.append((name, value))
        return tensors, tuple(told)


class ModuleFacts:
    """What is known of a network's modules. Asked in one thread at a time."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._known: list[ModuleFact] = []
        self._code: set[str] = set()
        self._restless: set[int] = set()
        self._contents = Contents([])
        self._anew: list[int] = []

    def now(self) -> list[ModuleFact]:
        """Each module; not to be changed."""
        if not (self._known and self._contents.holds()):
            self._look()
        for place in self._anew:
            self._known[place] = ModuleFact(self._known[place].module, restless=True)
        return self._known

    def modules(self) -> list[nn.Module]:
        """All of them."""
        return [each.module for each in self.now()]

    def code(self) -> set[str]:
        """The packages that its classes are from, but for torch; as of the last question."""
        return self._code

    def reading(self) -> tuple[Any, ...]:
        """What a replay takes for what it was: where all tensors are and how they lie there, and settings."""
        readings = [each.reading for each in self.now()]
        places = [(t.data_ptr(), t.stride(), t.dtype) for tensors, _ in readings for t in tensors]
        return tuple(told for _, told in readings), tuple(places)

    def _look(self) -> None:
        # What has changed once may do so in each call, and to look for it takes longer than to look at it.
        self._restless |= {id(each.module) for each in self._known if not each.contents.holds()}
        self._known = [ModuleFact(module, id(module) in self._restless) for module in self._network.modules()]
        self._contents = Contents([table for each in self._known for table in each.contents.tables])
        self._code = {type(each.module).__module__.partition(".")[0] for each in self._known} - {"torch"}
        self._anew = [place for place, each in enumerate(self._known) if each.anew]


def _is_fixed(value: Any) -> bool:
    """Whether it is a tuple that nothing can change."""
    return type(value) is tuple and all(type(item) in PLAIN for item in cast("tuple[Any, ...]", value))


def _holds_more(value: Any) -> bool:
    """Whether it is, or holds, more than settings and functions: what a call may have put there."""
    if isinstance(value, (list, tuple, set)):
        return any(type(item) not in PLAIN for item in cast("list[Any]", value))
    if isinstance(value, dict):
        return any(type(item) not in PLAIN for item in cast("dict[Any, Any]", value).values())
    return isinstance(value, Tensor) or not (isinstance(value, nn.Module) or callable(value))
