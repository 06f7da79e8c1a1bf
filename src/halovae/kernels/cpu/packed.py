"""Convolution and transposed convolution by oneDNN with weights in its own order; plain torch where it can't."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.kernels.kept import derived
from halovae.kernels.memory_format import memory_format
from halovae.kernels.shapes_only import device_type

LIGHT = 8
"""A picture with as many times fewer elements than the weight is convolved faster than the weight is packed."""

PACKED_CONVOLUTION = "mkldnn._convolution_pointwise.default"
"""The operator that takes packed weights; by its name, since it is not in every torch."""

Ints = Sequence[int]


def can_pack(dtype: torch.dtype) -> bool:
    return dtype != torch.float64 and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def convolve(
    tensor: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints
) -> Tensor:
    """As torch.nn.functional.conv2d and conv3d with one group, and a weight from `prepared`."""
    if not (weight.is_mkldnn or (weight.is_meta and _packs(weight, weight.dtype))):
        if _packs(weight, weight.dtype):
            return _with_model_order(tensor, weight, bias, stride, padding, dilation)
        return (F.conv2d, F.conv3d)[tensor.ndim - 4](tensor, weight, bias, stride, padding, dilation)
    operation: Any = torch.ops.mkldnn._convolution_pointwise
    return operation(tensor, weight, bias, padding, stride, dilation, 1, "none", [], "")


def _with_model_order(
    tensor: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints
) -> Tensor:
    """Channels first for this once: else the weight would be copied to channels last before it is put in order."""
    first, last = torch.contiguous_format, memory_format(tensor.ndim, True)
    tensor, weight = tensor.contiguous(memory_format=first), weight.contiguous(memory_format=first)
    result = torch.mkldnn_convolution(tensor, weight, bias, padding, stride, dilation, 1)
    return result.contiguous(memory_format=last)


@dataclass(frozen=True)
class Geometry:
    """All that the order of a packed weight depends on."""

    weight: tuple[int, ...]
    dtype: torch.dtype
    source: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def is_light(self) -> bool:
        """Whether the picture is small beside the weight."""
        positions = self.source[0] * prod(self.source[2:])
        return LIGHT * positions * sum(self.weight[:2]) < prod(self.weight)

    def pack(self, weight: Tensor) -> Tensor:
        if weight.is_meta:
            return weight.clone()  # of shapes alone the order doesn't matter
        operation: Any = torch.ops.mkldnn._reorder_convolution_weight
        return operation(weight, self.padding, self.stride, self.dilation, 1, self.source)


def _packs(weight: Tensor, dtype: torch.dtype) -> bool:
    return device_type(weight.device) == "cpu" and can_pack(dtype)


def prepared(
    weight: Tensor, kind: Hashable, make: Callable[[], Tensor], geometry: Geometry, made: dict[Geometry, Tensor]
) -> Tensor:
    """`make()`, a weight in the working dtype, in the order that this convolution asks for.

    One in the order that another convolution asks for would do, but can take many times as long. Where the picture is
    small beside the weight, that is left as it is.

    Args:
        kind: says what `make` does with it.
        make: converts it, or cuts off what is not needed.
        made: what was made for the piece before, of the same picture.
    """
    if geometry not in made:
        made.clear()
        if _packs(weight, geometry.dtype):
            made[geometry] = make() if geometry.is_light else geometry.pack(make())
        else:
            last = memory_format(weight.ndim, True)
            made[geometry] = derived(weight, kind, lambda: make().contiguous(memory_format=last))
    return made[geometry]
