"""What a network is told about sizes, the views and the tensors that it makes of them: all are of the whole picture.

A network asks for sizes to decide ("more than 1024 positions? then linear attention"), to count, to make views, and to
make tensors. Every answer is a number of the whole picture, so that nothing can come out differently on a shard. Views
move no data between ranks, and are made by the layout, which knows what such a size means for the shard; a tensor made
for the whole picture is cut where it meets shards. A size remembers how it is cut as long as it is clear, so that
blanks are no larger than a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.functions import named
from halovae.base.geometry import divides
from halovae.comm import default_generator
from halovae.exact.halo import own_part
from halovae.exact.layout import (
    AxisFactor,
    Dim,
    Factor,
    Layout,
    axes_in,
    axis_factor,
    global_length,
    is_sharded,
    layout_of,
    length,
    mark,
    merge_factors,
    permuted,
    plain,
    require_axis,
    require_layout,
    reshaped,
    shape_of,
    split_factor,
)
from halovae.exact.mesh import Mesh
from halovae.exact.rules.attention import prefix_mask, remember_runs
from halovae.exact.shard_mode import maker, rule


@rule(*named("flatten", "squeeze", "unsqueeze", "ravel"))
def regroup(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = require_layout(tensor)
    viewed = reshaped(layout, _regrouped(func, layout.whole, *_given(args, kwargs)))
    return mark(func(tensor, *args, **kwargs), viewed)


@lru_cache(maxsize=1024)
def _regrouped(func: Any, shape: tuple[int, ...], args: Any, kwargs: Any) -> tuple[int, ...]:
    return tuple(func(_of_shape(shape), *args, **dict(kwargs)).shape)


def _of_shape(shape: tuple[int, ...]) -> Tensor:
    """A tensor to try views on. Not on the meta device, where a prediction would take it for work."""
    return torch.empty((), device="cpu").expand(shape)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Arguments as keys of a cache."""
    return tuple(map(_hashable, args)), tuple((name, _hashable(value)) for name, value in kwargs.items())


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


@rule(*named("reshape", "view"))
def reshape(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The sizes are those of the whole: the layout tells what they are on the shard."""
    layout = require_layout(tensor)
    sizes = args or tuple(kwargs.values())
    if isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if not all(isinstance(size, int) for size in sizes):
        raise NotExactError("a view as another dtype")
    return _viewed(tensor, layout, sizes)


@rule(*named("unflatten"))
def unflatten(mesh: Mesh, func: Any, tensor: Tensor, dim: int, sizes: Any) -> Any:
    layout = require_layout(tensor)
    dim %= layout.ndim
    return _viewed(tensor, layout, (*layout.whole[:dim], *sizes, *layout.whole[dim + 1 :]))


@rule(*named("reshape_as", "view_as"))
def reshape_as(mesh: Mesh, func: Any, tensor: Tensor, other: Tensor) -> Any:
    layout, wanted = layout_of(tensor), layout_of(other)
    shape = wanted.whole if wanted else shape_of(other)
    return tensor.reshape(shape) if layout is None else _viewed(tensor, layout, shape)


def _viewed(tensor: Tensor, layout: Layout, sizes: Sequence[int]) -> Tensor:
    viewed = _layout_of_view(layout, tuple(sizes))
    # Not as a view: a shard may lie in memory with gaps where the whole does not.
    return mark(tensor.reshape(viewed.shape), viewed)


@lru_cache(maxsize=4096)
def _layout_of_view(layout: Layout, sizes: tuple[int, ...]) -> Layout:
    """The layout of a view by sizes of the whole, one of which may be -1."""
    count, known = prod(layout.whole), prod(size for size in sizes if size != -1)
    rest = count // known if known and -1 in sizes else 1
    if known * rest != count or sizes.count(-1) > 1 or (not known and -1 in sizes):
        raise NotExactError(f"there is no view of {layout.whole} as {tuple(map(int, sizes))}")
    return reshaped(layout, tuple(int(rest if size == -1 else size) for size in sizes))


@rule(*named("permute", "transpose", "movedim", "moveaxis", "swapaxes", "t"), Tensor.mT.__get__, Tensor.T.__get__)  # type: ignore[attr-defined]
def permute(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = require_layout(tensor)
    result = func(tensor, *args, **kwargs)
    return mark(result, permuted(layout, _order(func, layout.ndim, *_given(args, kwargs))))


@lru_cache(maxsize=1024)
def _order(func: Any, ndim: int, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> tuple[int, ...]:
    """Where each dimension of the result comes from, as a tensor whose sizes are their own positions tells."""
    return tuple(size - 2 for size in func(_of_shape(tuple(range(2, ndim + 2))), *args, **dict(kwargs)).shape)


@rule(*named("expand", "broadcast_to"))
def expand(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = require_layout(tensor)
    sizes = args or (kwargs["size"],)
    return _expanded(mesh, tensor, layout, tuple(sizes[0]) if isinstance(sizes[0], (tuple, list)) else sizes)


@rule(*named("expand_as"))
def expand_as(mesh: Mesh, func: Any, tensor: Tensor, other: Tensor) -> Any:
    layout, wanted = layout_of(tensor), layout_of(other)
    sizes = sizes_of(mesh, wanted) if wanted else shape_of(other)
    return tensor.expand(sizes) if layout is None else _expanded(mesh, tensor, layout, sizes)


def _expanded(mesh: Mesh, tensor: Tensor, layout: Layout, sizes: Sequence[int]) -> Tensor:
    """One position becomes as many as asked for, cut where that is clear from the number."""
    lead = len(sizes) - layout.ndim
    dims: list[Dim] = []
    taken = axes_in(layout.dims)
    for place, size in enumerate(sizes, start=-lead):
        dim = layout.dims[place] if place >= 0 else plain(1)
        if size not in (-1, global_length(dim)):
            if global_length(dim) != 1:
                raise NotExactError(f"it expands {global_length(dim)} positions to {size}")
            dim = cut_as(mesh, [size]).dims[0]
            dim = plain(int(size)) if axes_in([dim]) & taken else dim
            taken |= axes_in([dim])
        dims.append(dim)
    result = Layout(tuple(dims))
    return mark(tensor.expand(result.shape), result)


@rule(*named("repeat", "tile"))
def repeat(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = require_layout(tensor)
    result = func(tensor, *args, **kwargs)
    dims: list[Dim] = [plain(size) for size in result.shape[: result.ndim - tensor.ndim]]
    for dim, size in zip(layout.dims, result.shape[len(dims) :], strict=True):
        if is_sharded(dim) and size != length(dim):
            raise NotExactError("a sharded dimension is repeated as a whole")
        dims.append(dim if is_sharded(dim) else plain(size))
    return mark(result, Layout(tuple(dims)))


@maker(*named("repeat_interleave"))
def repeat_interleave(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = layout_of(tensor)
    if layout is None:
        return remember_runs(func, tensor, args, kwargs)
    repeats = args[0] if args else kwargs["repeats"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(repeats, int) or dim is None:
        raise NotExactError("only a whole number of repeats along one dimension")
    result = func(tensor, *args, **kwargs)
    return mark(result, layout.replace(dim, merge_factors((*layout.dims[dim], Factor(int(repeats))))))


@rule(*named("pixel_shuffle"))
def pixel_shuffle(mesh: Mesh, func: Any, tensor: Tensor, factor: int) -> Any:
    layout = require_layout(tensor)
    result = func(tensor, factor)
    if is_sharded(layout.dims[-3]):
        raise NotExactError("the channels are sharded")
    height, width = (merge_factors((*dim, Factor(factor))) for dim in layout.dims[-2:])
    return mark(result, Layout((*layout.dims[:-3], plain(result.shape[-3]), height, width)))


@rule(*named("pixel_unshuffle"))
def pixel_unshuffle(mesh: Mesh, func: Any, tensor: Tensor, factor: int) -> Any:
    layout = require_layout(tensor)
    if is_sharded(layout.dims[-3]) or any(global_length(dim) % factor for dim in layout.dims[-2:]):
        raise NotExactError("the channels are sharded, or the picture does not divide")
    for dim in (dim for dim in (-2, -1) if is_sharded(layout.dims[dim])):
        if not divides(require_axis(layout, dim).cut, factor):
            raise NotExactError(f"it groups {factor} rows, which does not divide the shards")
    outer = [split_factor(dim[0], global_length(dim) // factor)[:1] for dim in layout.dims[-2:]]
    result = func(tensor, factor)
    return mark(result, Layout((*layout.dims[:-3], plain(result.shape[-3]), *outer)))


@rule(*named("flip"))
def flip(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = require_layout(tensor)
    dims = args[0] if args and isinstance(args[0], (list, tuple)) else args or kwargs["dims"]
    if any(is_sharded(layout.dims[dim]) for dim in ([dims] if isinstance(dims, int) else dims)):
        raise NotExactError("it reverses a sharded dimension")
    return mark(func(tensor, *args, **kwargs), layout)


# ---- sizes, and tensors made of them ---------------------------------------------------------------------------------


class CutSize(int):
    """A number of positions of the whole picture that remembers what it is the product of.

    Attributes:
        factors: how the positions are cut.
        place: of the mesh on which they are cut so.
    """

    factors: tuple[Factor, ...]
    place: object

    @classmethod
    def of(cls, number: int, factors: tuple[Factor, ...], place: object) -> CutSize:
        size = cls(number)
        size.factors, size.place = factors, place
        return size

    # Sizes are multiplied a lot and seldom asked for more than the number, so nothing is simplified here.

    def __mul__(self, other: Any) -> Any:
        product = super().__mul__(other)
        return CutSize.of(product, (*self.factors, *_factors(other)), self.place) if isinstance(other, int) else product

    def __rmul__(self, other: Any) -> Any:
        product = super().__rmul__(other)
        return CutSize.of(product, (*_factors(other), *self.factors), self.place) if isinstance(other, int) else product

    def __floordiv__(self, other: Any) -> Any:
        result, factor = super().__floordiv__(other), axis_factor(merge_factors(self.factors))
        if factor is None or not isinstance(other, int) or not other or not divides(factor.cut, int(other)):
            return result
        return CutSize.of(result, split_factor(factor, result)[:1], self.place)

    def __reduce__(self) -> Any:
        return int, (int(self),)


def _factors(number: int) -> tuple[Factor, ...]:
    return number.factors if isinstance(number, CutSize) else plain(int(number))


def cut_as(mesh: Mesh, sizes: Iterable[Any]) -> Layout:
    """The layout of a tensor of these sizes: cut where it is clear from them, else whole.

    A second dimension of one axis is whole: of the scores of all queries and all keys, a rank has those of its queries.
    """
    dims: list[Dim] = []
    for size in sizes:
        factors = size.factors if isinstance(size, CutSize) and size.place is mesh.place else ()
        axes = [factor.axis for factor in factors if isinstance(factor, AxisFactor)]
        is_clear = axes and len(set(axes)) == len(axes) and axes_in(dims).isdisjoint(axes)
        dims.append(merge_factors(factors) if is_clear else plain(int(size)))
    return Layout(tuple(dims))


def sizes_of(mesh: Mesh, layout: Layout) -> torch.Size:
    """The whole shape."""
    known = mesh.sizes.get(layout)
    if known is None:
        sizes = (
            CutSize.of(global_length(dim), dim, mesh.place) if is_sharded(dim) else length(dim) for dim in layout.dims
        )
        known = mesh.sizes[layout] = torch.Size(sizes)
    return known


_SHAPE, _NBYTES = (getattr(Tensor, name).__get__ for name in ("shape", "nbytes"))


@rule(_SHAPE, Tensor.size)
def size(mesh: Mesh, func: Any, tensor: Tensor, dim: SupportsIndex | None = None) -> Any:
    sizes = sizes_of(mesh, require_layout(tensor))
    return sizes if dim is None else sizes[dim]


@rule(Tensor.__len__, Tensor.numel, Tensor.nelement, torch.numel, _NBYTES)
def count(mesh: Mesh, func: Any, tensor: Tensor) -> int:
    """Rows, elements or bytes."""
    whole = require_layout(tensor).whole
    if func is Tensor.__len__:
        return int(whole[0])
    return prod(whole) * (tensor.element_size() if func == _NBYTES else 1)


@rule(Tensor.stride)
def stride(mesh: Mesh, func: Any, tensor: Tensor, dim: int | None = None) -> Any:
    """Of the whole, which lies in memory as its shards do where these have no gaps."""
    layout = require_layout(tensor)
    own, strides = tensor.stride(), [0] * tensor.ndim
    here = there = 1
    for d in sorted(range(tensor.ndim - 1, -1, -1), key=lambda d: own[d]):
        if own[d] != here and layout.shape[d] > 1:
            raise NotExactError("it is part of a larger tensor or repeats itself, so the whole's strides are not known")
        strides[d] = there
        here, there = here * max(1, layout.shape[d]), there * max(1, layout.whole[d])
    return tuple(strides) if dim is None else strides[dim]


# ---- blanks of a shard's size, random numbers cut to it -------------------------------------------------------------


@maker(torch.zeros, torch.ones, torch.empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty)
def constant(mesh: Mesh, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    before = [arg for arg in args[:1] if isinstance(arg, Tensor)]
    size = args[len(before) :] or (kwargs.pop("size"),)
    return _made(mesh, func, tuple(before), size, (), kwargs)


@maker(Tensor.new_full)
def new_full(mesh: Mesh, func: Any, tensor: Tensor, size: Any, fill_value: Any, **kwargs: Any) -> Tensor:
    return _made(mesh, func, (tensor,), (size,), (fill_value,), kwargs)


@maker(torch.full)
def full(mesh: Mesh, func: Any, size: Any, fill_value: Any, **kwargs: Any) -> Tensor:
    if len(size) == 2 and isinstance(size[0], CutSize) and size[0] == size[1] and fill_value == float("-inf"):
        return prefix_mask(size[0], kwargs.get("dtype"), kwargs.get("device"))
    return _made(mesh, func, (), (size,), (fill_value,), kwargs)


def _made(
    mesh: Mesh, func: Any, before: tuple[Any, ...], size: tuple[Any, ...], behind: tuple[Any, ...], kwargs: Any
) -> Tensor:  # fmt: skip
    """A blank of the given size, which is that of the whole, cut where that is clear from the size."""
    size = tuple(size[0]) if isinstance(size[0], (tuple, list)) else size
    layout = cut_as(mesh, size)
    return mark(func(*before, layout.shape, *behind, **kwargs), layout)


@rule(torch.tensor, torch.as_tensor)
def from_numbers(mesh: Mesh, func: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotExactError("it copies a shard into an ordinary tensor")


@rule(torch.zeros_like, torch.ones_like, torch.full_like)
def constant_like(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return mark(func(tensor, *args, **kwargs), require_layout(tensor))


@maker(torch.randn, torch.rand)
def random(mesh: Mesh, func: Any, *size: Any, **kwargs: Any) -> Tensor:
    """Noise for a shard is cut out of noise drawn for the whole picture, from the first rank's generator."""
    sizes = tuple(size[0] if size and not isinstance(size[0], int) else size or kwargs.pop("size"))
    device = torch.device(kwargs.get("device") or torch.get_default_device())
    _share(mesh, kwargs.get("generator") or default_generator(device), device)
    layout = cut_as(mesh, sizes)
    noise = func(layout.whole, **kwargs)
    for dim in layout.sharded_dims:
        noise = own_part(mesh, noise, dim, layout.dims[dim])
    return mark(noise.contiguous(), layout)


def _share(mesh: Mesh, generator: torch.Generator, device: torch.device) -> None:
    """Bring every rank's generator to the state of the first one's."""
    if device.type == "meta":
        return  # on shapes alone there are no numbers
    state = generator.get_state().to(device)
    others = [rank for rank in range(mesh.size) if rank != mesh.comm.rank]
    if mesh.comm.rank == 0:
        mesh.comm.exchange([(rank, state) for rank in others], [])
    else:
        mesh.comm.exchange([], [(0, state)])
        generator.set_state(state.cpu())


@maker(*named("randn_like", "rand_like", "randint_like", "bernoulli", "normal", "uniform", "exponential", "random",
             "randint", "randperm", "multinomial"))  # fmt: skip
def unshaped_random(mesh: Mesh, func: Any, *args: Any, **kwargs: Any) -> Any:
    tensors = [value for value in args if isinstance(value, Tensor)]
    if any(layout_of(tensor) for tensor in tensors):
        raise NotExactError("random numbers are drawn for a shard alone")
    device = tensors[0].device if tensors else torch.device(kwargs.get("device") or torch.get_default_device())
    _share(mesh, kwargs.get("generator") or default_generator(device), device)
    return func(*args, **kwargs)
