"""Running on shapes alone, while following which network call each tensor comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from halovae.base.private_torch import TorchDispatchMode, decomposes, schema
from halovae.base.trees import mapped, tensors_of

Origin = frozenset[int]
"""Numbers of the network calls that a tensor comes from."""


_NUMBERS = frozenset((int, float, bool, type(None)))
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
"""A view whose schema doesn't say so."""


_known: dict[Any, Any] = {}
"""Results of operators by shapes of their arguments. One for the whole process: most are asked for in several runs, and
many operators find their shapes in Python, which takes longer than all else here."""
_MOST = 2**14


class Shapes:
    """Runs operators on the meta device: it finds shapes, computes and allocates nothing."""

    def __init__(self) -> None:
        self._makes: dict[Any, bool] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator's result on the meta device, wherever its arguments are."""
        if not self.makes(func):
            if not kwargs and args[0].is_meta and all(type(value) in _NUMBERS for value in args[1:]):
                return func(*args)
            return func(*mapped(to_meta, args), **mapped(to_meta, kwargs))
        key = func, torch.get_default_dtype(), key_of(args), key_of(kwargs)
        found = _known.get(key)
        if found is None:
            found = func(*mapped(to_meta, args), **mapped(to_meta, kwargs))
            if len(_known) >= _MOST:
                _known.clear()
            _known[key] = found
        return fresh(found)

    def makes(self, func: Any) -> bool:
        """Whether an operator only makes new tensors: it runs once for arguments of equal shapes."""
        if func not in self._makes:
            told = schema(func)
            plain = all(value.alias_info is None for value in (*told.arguments, *told.returns))
            self._makes[func] = plain and func is not _UNSAFE_VIEW
        return self._makes[func]


def meets_meta(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator has to run on the meta device: a tensor of its arguments is there, or its result will be."""
    return has_meta(args) or (bool(kwargs) and (has_meta(kwargs) or str(kwargs.get("device")) == "meta"))


def has_meta(value: Any) -> bool:
    """Whether a tensor among an operator's arguments is on the meta device."""
    if isinstance(value, Tensor):
        return value.is_meta
    if isinstance(value, dict):
        value = list(cast("dict[str, Any]", value).values())
    if not isinstance(value, (list, tuple)):
        return False
    # Nearly all are tensors and numbers: told apart here, they cost least.
    return any([type(item) not in _NUMBERS and has_meta(item) for item in cast("list[Any]", value)])  # noqa: C419


class OnShapes(TorchDispatchMode):
    """Sees each operator of a run on shapes."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No compiler is on its way here, and what keeps it out takes long."""
        return False


class Remembered(OnShapes):
    """Within it, an operator on the meta device runs once for arguments of equal shapes."""

    def __init__(self) -> None:
        super().__init__()
        self._shapes = Shapes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._shapes.run(func, args, kwargs) if meets_meta(args, kwargs) else func(*args, **kwargs)


class Dataflow(OnShapes):
    """Every operator that meets a meta tensor runs on meta tensors: it finds shapes, computes and allocates nothing.

    Attributes:
        reads: ids of the followed tensors that operators read since it was cleared.
        draws: the random draws since it was cleared.
        watched: tensors by their ids.
        met: whether an operator has read one of those.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: set[int] = set()
        self.draws: list[Draw] = []
        self.watched: dict[int, Tensor] = {}
        self.met = False
        self._origins: dict[int, tuple[Tensor, Origin]] = {}
        self._shapes = Shapes()

    def follow(self, tensor: Tensor, origin: Origin) -> None:
        """Remember where a tensor comes from; the tensor is kept, so that its id stays its own."""
        self._origins[id(tensor)] = (tensor, origin)

    def origin(self, tensor: Tensor) -> Origin:
        known = self._origins.get(id(tensor))
        return known[1] if known else Origin()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_of((args, kwargs))
        if self.watched and not self.met:
            self.met = any(id(tensor) in self.watched for tensor in tensors)
        chance = torch.Tag.nondeterministic_seeded in func.tags
        if chance and decomposes(func):
            # In inference mode dropout and attention come whole, and may not draw at all.
            with self:
                return func.decompose(*args, **kwargs)
        if chance:
            self.draws.append(Draw(func, args, kwargs))
        if not meets_meta(args, kwargs):
            return func(*args, **kwargs)
        known = [found for tensor in tensors if (found := self._origins.get(id(tensor)))]
        self.reads.update([id(tensor) for tensor, _ in known])
        origin = Origin().union(*[origin for _, origin in known])
        result = self._shapes.run(func, args, kwargs)
        for tensor in tensors_of(result):
            self.follow(tensor, origin | self.origin(tensor))
        return result


def key_of(value: Any) -> Any:
    """What tells calls of an operator apart: shapes, not values of tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if type(value) in _NUMBERS:
        return type(value), value
    if isinstance(value, (list, tuple)):
        items = cast("list[Any]", value)
        if items and all([type(item) is int for item in items]):  # noqa: C419  sizes
            return int, *items
        return tuple([key_of(item) for item in items])
    if isinstance(value, dict):
        return tuple([(name, key_of(item)) for name, item in cast("dict[str, Any]", value).items()])
    return type(value), None if isinstance(value, torch.Generator) else value


def fresh(result: Any) -> Any:
    """New tensors like those of a result, on the meta device."""
    return _fresh(result) if isinstance(result, Tensor) else mapped(_fresh, result)


def _fresh(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


def to_meta(leaf: Any) -> Any:
    """A leaf for an operator that runs on the meta device, where no generator is needed."""
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    if isinstance(leaf, torch.Generator):
        return None
    return leaf if isinstance(leaf, Tensor) and leaf.is_meta else _fresh(leaf)


@dataclass(init=False, unsafe_hash=True, repr=False)
class Spec:
    """Stands for a tensor: shape, dtype, and the order of its dimensions in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self.order = memory_order(tensor)

    def __repr__(self) -> str:
        return f"{self.shape} {self.dtype}"

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def empty(self, device: torch.device | str) -> Tensor:
        """A new tensor, in the same memory order."""
        strides, step = [0] * len(self.shape), 1
        for dim in reversed(self.order):
            strides[dim], step = step, step * max(1, self.shape[dim])
        return torch.empty_strided(self.shape, strides, dtype=self.dtype, device=device)

    def zeros(self, device: torch.device | str) -> Tensor:
        """Zeros that take no memory: one element, seen everywhere."""
        # Made in two steps: a prediction takes what `torch.zeros` makes for a constant, whose values are known.
        return torch.empty((), dtype=self.dtype, device=device).zero_().expand(self.shape)

    def laid(self, flat: Tensor, order: tuple[int, ...]) -> Tensor:
        """A tensor of this shape whose elements lie in memory as they do in `flat`, its dimensions in that order."""
        return flat.view([self.shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])


def flat(tensor: Tensor) -> Tensor:
    """The elements of a tensor as they lie in memory; in the order of its dimensions where it has gaps."""
    return tensor.permute(memory_order(tensor)).reshape(-1)


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions from the slowest to the fastest; a tensor that is not dense counts as contiguous."""
    natural = tuple(range(tensor.ndim))
    if tensor.is_contiguous():
        return natural
    # A dimension of size 1 has an arbitrary stride; sorting is stable, so such ties keep the natural order.
    order = sorted(natural, key=lambda dim: -tensor.stride(dim))
    step = 1
    for dim in reversed(order):
        if tensor.shape[dim] > 1 and tensor.stride(dim) != step:
            return natural
        step *= max(1, tensor.shape[dim])
    return tuple(order)


class Draw:
    """One random draw: enough to make it again and throw it away, so that later draws come out the same."""

    def __init__(self, func: Any, args: Any, kwargs: Any) -> None:
        self._func = func
        self._args, self._kwargs = mapped(_to_spec, args), mapped(_to_spec, kwargs)

    def repeat(self, device: torch.device) -> None:
        def real(leaf: Any) -> Any:
            if isinstance(leaf, Spec):
                return leaf.empty(device)
            return device if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

        self._func(*mapped(real, self._args), **mapped(real, self._kwargs))


def _to_spec(leaf: Any) -> Any:
    return Spec(leaf) if isinstance(leaf, Tensor) else leaf


def repeat(draws: Iterable[Draw], device: torch.device) -> None:
    """Make the draws that a network call would have made."""
    for draw in draws:
        draw.repeat(device)
