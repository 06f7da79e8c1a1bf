"""Tensors made inside the network, for the whole picture: blanks of a shard's size, random numbers cut to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.comm import default_generator
from halovae.exact.halo import own_part
from halovae.exact.layout import layout_of, mark
from halovae.exact.registry import Mesh, named, rule
from halovae.exact.rules.elementwise import mark_like
from halovae.exact.rules.masks import prefix_mask
from halovae.exact.rules.sizes import CutSize, cut_as


@rule(torch.zeros, torch.ones, torch.empty)
def constant(mesh: Mesh, func: Any, *size: Any, **kwargs: Any) -> Tensor:
    return _made(mesh, func, (), size or (kwargs.pop("size"),), (), kwargs)


@rule(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty)
def new_constant(mesh: Mesh, func: Any, tensor: Tensor, *size: Any, **kwargs: Any) -> Tensor:
    return _made(mesh, func, (tensor,), size or (kwargs.pop("size"),), (), kwargs)


@rule(Tensor.new_full)
def new_full(mesh: Mesh, func: Any, tensor: Tensor, size: Any, fill_value: Any, **kwargs: Any) -> Tensor:
    return _made(mesh, func, (tensor,), (size,), (fill_value,), kwargs)


@rule(torch.full)
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
    if layout_of(data):
        raise NotExactError("it copies a shard into an ordinary tensor")
    return func(data, *args, **kwargs)


@rule(torch.zeros_like, torch.ones_like, torch.full_like)
def constant_like(mesh: Mesh, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return mark_like(func(tensor, *args, **kwargs), tensor)


@rule(torch.randn, torch.rand)
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


@rule(*named("randn_like", "rand_like", "randint_like", "bernoulli", "normal", "uniform", "exponential", "random",
             "randint", "randperm", "multinomial"))  # fmt: skip
def unshaped_random(mesh: Mesh, func: Any, *args: Any, **kwargs: Any) -> Any:
    tensors = [value for value in args if isinstance(value, Tensor)]
    if any(layout_of(tensor) for tensor in tensors):
        raise NotExactError("random numbers are drawn for a shard alone")
    device = tensors[0].device if tensors else torch.device(kwargs.get("device") or torch.get_default_device())
    _share(mesh, kwargs.get("generator") or default_generator(device), device)
    return func(*args, **kwargs)
