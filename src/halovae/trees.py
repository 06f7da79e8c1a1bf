"""Tensors inside results: lists, dicts, output classes and distributions, at any depth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[[Any], Any], value: Any, kind: type = Tensor) -> Any:
    """A copy of a result with every tensor (or other `kind` of leaf) in it replaced.

    Knows tensors, lists, tuples, dicts and plain objects with tensors as attributes, such as output classes and
    distributions, at any depth.
    """
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple):
        items = [map_tensors(function, item, kind) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_tensors(function, item, kind) for item in value]
    if type(value) is dict:
        return {key: map_tensors(function, item, kind) for key, item in value.items()}
    if not hasattr(value, "__dict__") or isinstance(value, (type, torch.nn.Module, torch.Generator)):
        return value
    replaced = copy.copy(value)
    for name, item in vars(value).items():
        mapped = map_tensors(function, item, kind)
        if mapped is not item:
            setattr(replaced, name, mapped)
    return replaced


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in a value, in the order `map_tensors` meets them."""
    found: list[Tensor] = []

    def look(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(look, value)
    return found


def on_meta(value: Any) -> Any:
    """A copy of a value whose tensors are on the meta device: shapes, strides and dtypes without data."""
    return map_tensors(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), value)


def is_picture(value: object) -> bool:
    """Whether a tensor has the shape of images (4-D) or video (5-D)."""
    return isinstance(value, Tensor) and value.ndim in (4, 5)


def pictures_in(value: Any) -> list[Tensor]:
    """The picture-like tensors (4-D or 5-D) in a value."""
    return [tensor for tensor in tensors_in(value) if is_picture(tensor)]
