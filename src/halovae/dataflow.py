"""Running on shapes alone, while following which network call each tensor comes from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Origin = frozenset[int]
"""Numbers of the network calls that a tensor comes from."""


class Dataflow(TorchDispatchMode):
    """Every operator that meets a meta tensor runs on meta tensors: it finds shapes, computes and allocates nothing.

    Attributes:
        reads: ids of the followed tensors that operators read since it was cleared.
        draws: the random draws since it was cleared.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: set[int] = set()
        self.draws: list[Draw] = []
        self._origins: dict[int, tuple[Tensor, Origin]] = {}
        self._known: dict[Any, Any] = {}

    def follow(self, tensor: Tensor, origin: Origin) -> None:
        """Remember where a tensor comes from; the tensor is kept, so that its id stays its own."""
        self._origins[id(tensor)] = (tensor, origin)

    def origin(self, tensor: Tensor) -> Origin:
        known = self._origins.get(id(tensor))
        return known[1] if known else Origin()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.draws.append(Draw(func, leaves, structure))
        if not any(t.is_meta for t in tensors) and torch.device("meta") not in leaves:
            return func(*args, **(kwargs or {}))
        self.reads.update(id(t) for t in tensors if id(t) in self._origins)
        origin = Origin().union(*(self.origin(t) for t in tensors))
        result = self._on_meta(func, [_to_meta(leaf) for leaf in leaves], structure)
        for tensor in tensor_leaves(result):
            self.follow(tensor, origin | self.origin(tensor))
        return result

    def _on_meta(self, func: Any, leaves: list[Any], structure: Any) -> Any:
        """Run an operator on meta tensors; one that makes new tensors only runs once for arguments of equal shapes."""
        key = None
        if all(value.alias_info is None for value in (*func._schema.arguments, *func._schema.returns)):
            key = (func, structure, *map(_key, leaves))
            if key in self._known:
                return pytree.tree_map(_fresh, self._known[key])
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        result = func(*args, **kwargs)
        if key:
            self._known[key] = result
        return result


def _key(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _fresh(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def tensor_leaves(tree: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _to_meta(leaf: Any) -> Any:
    """A leaf for an operator that runs on the meta device, where no generator is needed."""
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    if isinstance(leaf, torch.Generator):
        return None
    return _fresh(leaf) if isinstance(leaf, Tensor) and not leaf.is_meta else leaf


class Spec:
    """Stands for a tensor: shape, dtype, and the order of its dimensions in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self.order = memory_order(tensor)

    def _key(self) -> tuple[Any, ...]:
        return self.shape, self.dtype, self.order

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"{self.shape} {self.dtype}"

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def empty(self, device: torch.device | str) -> Tensor:
        """A new tensor, in the same memory order."""
        flat = torch.empty([self.shape[d] for d in self.order], dtype=self.dtype, device=device)
        return flat.permute([self.order.index(d) for d in range(len(self.order))])

    def zeros(self, device: torch.device | str) -> Tensor:
        """Zeros that take no memory: one element, seen everywhere."""
        return torch.zeros((), dtype=self.dtype, device=device).expand(self.shape)

    def arranged(self, tensor: Tensor) -> Tensor:
        """The tensor in this memory order, dense: a copy only where it is not so already."""
        return self.flat(tensor).permute([self.order.index(d) for d in range(len(self.order))])

    def flat(self, tensor: Tensor) -> Tensor:
        """The tensor's elements as they lie in memory, contiguous: what is sent."""
        return tensor.permute(self.order).contiguous()


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions from the slowest to the fastest; a tensor that is not dense counts as contiguous."""
    # A dimension of size 1 has an arbitrary stride; sorting is stable, so such ties keep the natural order.
    order = sorted(range(tensor.ndim), key=lambda d: -tensor.stride(d))
    return tuple(order) if tensor.permute(order).is_contiguous() else tuple(range(tensor.ndim))


class Draw:
    """One random draw: enough to make it again and throw it away, so that later draws come out the same."""

    def __init__(self, func: Any, leaves: list[Any], structure: Any) -> None:
        self._func, self._structure = func, structure
        self._leaves = [Spec(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def repeat(self, device: torch.device) -> None:
        def real(leaf: Any) -> Any:
            if isinstance(leaf, Spec):
                return leaf.empty(device)
            return device if leaf == torch.device("meta") else leaf

        args, kwargs = pytree.tree_unflatten(list(map(real, self._leaves)), self._structure)
        self._func(*args, **kwargs)


def repeat(draws: Iterable[Draw], device: torch.device) -> None:
    for draw in draws:
        draw.repeat(device)
