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


@rule(torch.zeros, torch.ones, torch.empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full)
def constant(mesh: Mesh, func: Any, *args: Any, **kwargs: Any) -> Any:
    return mark_uniform(func(*args, **kwargs))


@rule(torch.full)
def full(mesh: Mesh, func: Any, size: Any, fill_value: Any, *args: Any, **kwargs: Any) -> Any:
    if len(size) == 2 and size[0] == size[1] and fill_value == float("-inf"):
        return prefix_mask(int(size[0]), kwargs.get("dtype"), kwargs.get("device"))
    return mark_uniform(func(size, fill_value, *args, **kwargs))


@rule(torch.zeros_like, torch.ones_like, torch.full_like)
def constant_like(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return mark_like(mark_uniform(func(tensor, *args, **kwargs)), tensor)


@rule(torch.randn, torch.rand)
def random(mesh: Mesh, func: Any, *size: Any, **kwargs: Any) -> Tensor:
    """Noise for a shard is cut out of noise drawn for the whole picture, from the first rank's generator.

    A size says nothing of shards; it is taken for one when it ends like the sharded tensor whose shape was asked last.
    """
    sizes = size[0] if size and not isinstance(size[0], int) else size or kwargs.pop("size")
    shape = tuple(map(int, sizes))
    layout = _ending_like(shape, mesh.asked)
    if layout is None:
        return func(shape, **kwargs)
    device = torch.device(kwargs.get("device") or "cpu")
    _share(mesh, kwargs.get("generator") or default_generator(device), device)
    noise = func([global_length(dim) for dim in layout.dims], **kwargs)
    for dim in layout.sharded_dims:
        factor = require_axis(layout, dim)
        low, high = factor.cut.extents[mesh.part(factor.axis)]
        noise = noise.narrow(dim, low, high - low)
    return mark(noise.contiguous(), layout)


def _ending_like(shape: tuple[int, ...], asked: Layout | None) -> Layout | None:
    """The layout of noise of this shape, or None if it is not noise for a shard."""
    if asked is None or not asked.sharded_dims:
        return None
    tail = asked.dims[asked.sharded_dims[0] :]
    lead = len(shape) - len(tail)
    if lead < 0 or tuple(map(length, tail)) != shape[lead:]:
        return None
    if any(is_sharded(dim) and axis_factor(dim) is None for dim in tail):
        return None
    return Layout((*map(plain, shape[:lead]), *tail))


def _share(mesh: Mesh, generator: torch.Generator, device: torch.device) -> None:
    """Bring every rank's generator to the state of the first one's."""
    state = generator.get_state().to(device)
    others = [rank for rank in range(mesh.size) if rank != mesh.comm.rank]
    if mesh.comm.rank == 0:
        mesh.comm.exchange([(rank, state) for rank in others], [])
    else:
        mesh.comm.exchange([], [(0, state)])
        generator.set_state(state.cpu())


@rule(*named("randn_like", "rand_like", "bernoulli", "normal"))
def unshaped_random(mesh: Mesh, func: Any, *args: Any, **kwargs: Any) -> Any:
    if any(layout_of(value) for value in args):
        raise NotExactError("random numbers are drawn for a shard alone")
    return func(*args, **kwargs)
