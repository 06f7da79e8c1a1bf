"""Convolution and transposed convolution by oneDNN with weights in its own order; plain torch where it can't."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.kernels.shapes import device_type
from halovae.kernels.weights import derived

KEEP_BELOW = 1 << 14
"""Weights are kept in packed order for calls of fewer positions than this; for more, packing is lost in the noise."""

PACKED_CONVOLUTION = "mkldnn._convolution_pointwise.default"
"""The operator that takes packed weights; by its name, since it is not in every torch."""

Ints = Sequence[int]


def can_pack(dtype: torch.dtype) -> bool:
    return dtype != torch.float64 and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def convolve(
    tensor: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints
) -> Tensor:
    """As torch.nn.functional.conv2d and conv3d with one group, and a weight from `prepared`."""
    if not (weight.is_mkldnn or (weight.is_meta and _is_packable(weight))):
        return (F.conv2d, F.conv3d)[tensor.ndim - 4](tensor, weight, bias, stride, padding, dilation)
    operation: Any = torch.ops.mkldnn._convolution_pointwise
    return operation(tensor, weight, bias, padding, stride, dilation, 1, "none", [], "")


def packed(weight: Tensor, shape: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Tensor:
    """A weight in the order that convolving a tensor of this shape by oneDNN asks for."""
    if weight.is_meta:
        return weight.clone()  # the order is oneDNN's secret
    operation: Any = torch.ops.mkldnn._reorder_convolution_weight
    return operation(weight, list(padding), list(stride), list(dilation), 1, list(shape))


def _is_packable(weight: Tensor) -> bool:
    return device_type(weight.device) == "cpu" and can_pack(weight.dtype)


def prepared(
    weight: Tensor, kind: Hashable, make: Callable[[], Tensor], shape: Ints, stride: Ints, padding: Ints, dilation: Ints
) -> Tensor:
    """`make()`, a weight in the working dtype, in the order that convolving a tensor of this shape asks for.

    `kind` says what `make` does with `weight`; the result is kept for small pictures. It is for this very shape: in the
    order that another one asks for, a convolution can take many times as long.
    """

    def pack() -> Tensor:
        made = make()
        return packed(made, shape, stride, padding, dilation) if _is_packable(made) else made

    positions = shape[0]
    for size in shape[2:]:
        positions *= size
    once = device_type(weight.device) == "cpu" and positions >= KEEP_BELOW
    return (
        pack() if once else derived(weight, (kind, tuple(shape), tuple(stride), tuple(padding), tuple(dilation)), pack)
    )
