"""Tensors made inside the network: constants fit any shard; random numbers are drawn for the whole picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halovae.comm import default_generator
from halovae.errors import NotExactError
from halovae.exact.elementwise import mark_like
from halovae.exact.layout import (
    Layout,
    axis_factor,
    global_length,
    is_sharded,
    layout_of,
    length,
    mark,
    mark_uniform,
    plain,
    require_axis,
)
from halovae.exact.masks import prefix_mask
from halovae.exact.registry import Mesh, named, rule
from halovae.exact.sizes import ShardSize, whole


@rule(torch.zeros, torch.ones, torch.empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full)
def constant(mesh: Mesh, func: Any, *args: Any, **kwargs: Any) -> Any:
    return mark_uniform(func(*args, **kwargs))


@rule(torch.full)
def full(mesh: Mesh, func: Any, size: Any, fill_value: Any, *args: Any, **kwargs: Any) -> Any:
    if len(size) == 2 and isinstance(size[0], ShardSize) and size[0] == size[1] and fill_value == float("-inf"):
        return prefix_mask(size[0], kwargs.get("dtype"), kwargs.get("device"))
    return mark_uniform(func(size, whole(fill_value), *args, **kwargs))


@rule(torch.tensor, torch.as_tensor)
def from_numbers(mesh: Mesh, func: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
    """A size written into a tensor is the picture's."""
    if layout_of(data):
        raise NotExactError("it copies a shard into an ordinary tensor")
    return func(_wholes(data), *args, **kwargs)


def _wholes(data: Any) -> Any:
    return type(data)(map(_wholes, data)) if type(data) in (list, tuple) else whole(data)


@rule(torch.zeros_like, torch.ones_like, torch.full_like)
def constant_like(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return mark_like(mark_uniform(func(tensor, *args, **kwargs)), tensor)


@rule(torch.randn, torch.rand)
def random(mesh: Mesh, func: Any, *size: Any, **kwargs: Any) -> Tensor:
    """Noise for a shard is cut out of noise drawn for the whole picture, from the first rank's generator.

    A size is taken for a shard's when it ends like the sharded tensor whose shape was asked last.
    """
    sizes = tuple(size[0] if size and not isinstance(size[0], int) else size or kwargs.pop("size"))
    device = torch.device(kwargs.get("device") or torch.get_default_device())
    _share(mesh, kwargs.get("generator") or default_generator(device), device)
    layout = _ending_like(sizes, mesh.asked)
    if layout is None:
        return func(tuple(map(int, sizes)), **kwargs)
    noise = func([global_length(dim) for dim in layout.dims], **kwargs)
    for dim in layout.sharded_dims:
        factor = require_axis(layout, dim)
        low, high = factor.cut.extents[mesh.part(factor.axis)]
        noise = noise.narrow(dim, low, high - low)
    return mark(noise.contiguous(), layout)


def _ending_like(sizes: tuple[int, ...], asked: Layout | None) -> Layout | None:
    """The layout of noise of this shape, or None if it is not noise for a shard."""
    if asked is None or not asked.sharded_dims:
        return None
    tail = asked.dims[asked.sharded_dims[0] :]
    lead = len(sizes) - len(tail)
    ends = [(int(size), whole(size)) for size in sizes[max(lead, 0) :]]
    if lead < 0 or ends != [(length(dim), global_length(dim)) for dim in tail]:
        return None
    if any(is_sharded(dim) and axis_factor(dim) is None for dim in tail):
        return None
    return Layout((*map(plain, sizes[:lead]), *tail))


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


@rule(*named("randn_like", "rand_like", "randint_like", "bernoulli", "normal", "uniform", "exponential", "random",
             "randint", "randperm", "multinomial"))  # fmt: skip
def unshaped_random(mesh: Mesh, func: Any, *args: Any, **kwargs: Any) -> Any:
    tensors = [value for value in args if isinstance(value, Tensor)]
    if any(layout_of(tensor) for tensor in tensors):
        raise NotExactError("random numbers are drawn for a shard alone")
    device = tensors[0].device if tensors else torch.device(kwargs.get("device") or torch.get_default_device())
    _share(mesh, kwargs.get("generator") or default_generator(device), device)
    return func(*args, **kwargs)
