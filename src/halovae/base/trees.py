"""Tensors inside values: in containers and objects of any kind, at any depth."""

from __future__ import annotations

import collections
import copy
import gc
import types
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from halovae.base.errors import InputError

_LEAVES = (
    Tensor, torch.nn.Module, torch.Generator, torch.Size, torch.dtype, torch.device, type, types.ModuleType,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, str, bytes, int, float, complex, range,
)  # fmt: skip
"""What is never looked into; besides, what has neither items nor attributes."""


def map_tensors(function: Callable[[Any], Any], value: Any, kind: type | tuple[type, ...] = Tensor) -> Any:
    """A copy of a value with every tensor (or other `kind` of leaf) in it replaced.

    Looks into sequences, mappings and sets, and into the attributes and slots of objects, such as output classes and
    distributions. What is in several places is replaced by one; what holds nothing to replace is not copied.

    Raises:
        InputError: a tensor is in an object of which no copy can be made.
    """
    if not any(isinstance(item, kind) for item in walk(value)):
        return value
    return _Mapper(function, kind).map(value)


class _Mapper:
    def __init__(self, function: Callable[[Any], Any], kind: type | tuple[type, ...]) -> None:
        self._function, self._kind = function, kind
        # The values are kept, so that their ids stay theirs.
        self._known: dict[int, tuple[Any, Any]] = {}
        self._begun: set[int] = set()

    def map(self, value: Any) -> Any:
        place = id(value)
        if place in self._known:
            return self._known[place][1]
        if isinstance(value, self._kind):
            mapped = self._function(value)
        elif place in self._begun:  # It holds itself.
            mapped = value if isinstance(value, _FIXED) else _blank_of(value)
        else:
            mapped = self._inside(value)
        self._known[place] = value, mapped
        return mapped

    def _inside(self, value: Any) -> Any:
        inside = contents(value)
        if not inside:
            return value
        self._begun.add(id(value))
        mapped = [self.map(item) for item in inside]
        if all(new is old for new, old in zip(mapped, inside, strict=True)):
            return value
        return _with(value, self._known.get(id(value), (value, None))[1], mapped)


def contents(value: Any) -> list[Any]:
    """What a container holds, and then what the attributes of an object are."""
    if isinstance(value, _LEAVES) or value is None:
        return []
    return [item for _, item in chain(_items(value), _attributes(value), _slots(value))]


# What a class makes of its own items and attributes when it is asked for them, or made, is passed by.


def _items(value: Any) -> list[tuple[Any, Any]]:
    """What a container holds, each with its key; without keys, with None."""
    base = _base(value)
    if base in (types.MappingProxyType, dict, collections.OrderedDict):
        return list(base.items(value))
    return [] if base is object else [(None, item) for item in base.__iter__(value)]


def _base(value: Any) -> Any:
    """The kind of container that a value is."""
    return next((base for base in _CONTAINERS if isinstance(value, base)), object)


_CONTAINERS: tuple[Any, ...] = (
    types.MappingProxyType, collections.OrderedDict, dict, list, tuple, collections.deque, set, frozenset,
)  # fmt: skip
_FIXED = (tuple, frozenset, types.MappingProxyType)


def _attributes(value: Any) -> list[tuple[str, Any]]:
    return list(getattr(value, "__dict__", {}).items())


def _slots(value: Any) -> list[tuple[Any, Any]]:
    """The slots that are filled, each as what sets it and its value."""
    found: list[tuple[Any, Any]] = []
    for kind in type(value).__mro__:
        if "__slots__" in vars(kind):
            members = (member for member in vars(kind).values() if isinstance(member, types.MemberDescriptorType))
            found += [(m, m.__get__(value)) for m in members if hasattr(value, m.__name__)]
    return found


def _with(value: Any, blank: Any, new: list[Any]) -> Any:
    """A copy with other contents.

    Args:
        blank: what is to become the copy, if there is something that refers to it.
        new: as `contents` of it gives them.
    """
    keys, rest = [key for key, _ in _items(value)], iter(new[len(_items(value)) :])
    items, base = new[: len(keys)], _base(value)
    if base is types.MappingProxyType:
        return types.MappingProxyType(dict(zip(keys, items, strict=True)))
    if base in (tuple, frozenset):
        try:
            filled = base.__new__(type(value), items)
        except TypeError:  # What torch's own functions with several results return.
            filled = type(value)(items)
    else:
        filled = _blank_of(value) if blank is None else blank
    if base in (dict, collections.OrderedDict):
        for key, item in zip(keys, items, strict=True):
            base.__setitem__(filled, key, item)
    elif base in (list, collections.deque):
        base.extend(filled, items)
    elif base is set:
        set.update(filled, items)
    for name, _ in _attributes(value):
        filled.__dict__[name] = next(rest)
    for member, _ in _slots(value):
        member.__set__(filled, next(rest))
    return filled


def _blank_of(value: Any) -> Any:
    """Another object of the same class, with nothing in it."""
    kind = type(value)
    if isinstance(value, collections.defaultdict):
        blank = collections.defaultdict.__new__(kind)
        collections.defaultdict.__init__(blank, cast("Any", value).default_factory)
        return blank
    if isinstance(value, collections.deque):
        blank = collections.deque.__new__(kind)
        collections.deque.__init__(blank, (), cast("Any", value).maxlen)
        return blank
    try:
        return _base(value).__new__(kind)
    except TypeError:  # It is made by code that is not Python.
        pass
    try:
        return copy.copy(value)
    except Exception as error:
        raise InputError(f"a tensor is in a {kind.__name__}, of which no copy can be made: {error}") from error


def walk(value: Any) -> Iterator[Any]:
    """The value and everything in it, each once, in the order in which `map_tensors` meets it."""
    seen: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) not in seen:
            seen[id(item)] = item
            yield item
            waiting += reversed(contents(item))


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in a value, each once, in the order `map_tensors` meets them."""
    return [item for item in walk(value) if isinstance(item, Tensor)]


_CLOSED = (Tensor, torch.nn.Module, type, types.ModuleType, types.CodeType, str, bytes, int, float, complex)


def hidden_tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a value holds where `map_tensors` does not look, each with the class of what holds it.

    Generators that have not ended, functions with variables of their own, keys of dicts.
    """
    seen = {id(item): item for item in walk(value)}
    waiting = [(type(item).__name__, item) for item in seen.values()]
    while waiting:
        holder, item = waiting.pop()
        if isinstance(item, types.FunctionType):
            inside: list[Any] = [item.__closure__, item.__defaults__, item.__kwdefaults__]
        elif isinstance(item, _CLOSED) or (isinstance(item, dict) and "__builtins__" in item):
            continue
        else:
            inside = gc.get_referents(item)
        for found in inside:
            if id(found) not in seen:
                seen[id(found)] = found
                waiting.append((holder, found))
                if isinstance(found, Tensor):
                    yield holder, found


def on_meta(value: Any) -> Any:
    """A copy of a value whose tensors are on the meta device: shapes, strides and dtypes without data."""
    return map_tensors(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), value)


def is_picture(value: object) -> bool:
    """Whether a tensor has the shape of images (4-D) or video (5-D)."""
    return isinstance(value, Tensor) and value.ndim in (4, 5)


def pictures_in(value: Any) -> list[Tensor]:
    """The picture-like tensors (4-D or 5-D) in a value."""
    return [tensor for tensor in tensors_in(value) if is_picture(tensor)]


# ---- an operator's arguments or results, which are simpler -----------------------------------------------------------


_NO_TENSORS = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, dict):
        value = [*cast("dict[str, Any]", value).values()]
    if isinstance(value, (list, tuple)):
        for item in cast("list[Any]", value):
            # Every operator of a run on shapes is asked: what is nearly always there is told apart first.
            if isinstance(item, Tensor):
                found.append(item)
            elif type(item) not in _NO_TENSORS:
                found += tensors_of(item)
    return found


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Lists, tuples and dicts with every leaf replaced, whatever it is."""
    if isinstance(value, (list, tuple)):
        items = [mapped(function, item) for item in cast("list[Any]", value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {name: mapped(function, item) for name, item in cast("dict[str, Any]", value).items()}
    return function(value)
