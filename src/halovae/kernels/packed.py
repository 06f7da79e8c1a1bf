"""Convolution and transposed convolution by oneDNN with weights in its own order; plain torch where it can't."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.kernels.weights import derived

KEEP_BELOW = 1 << 14
"""Weights are kept in packed order for calls of fewer positions than this; for more, packing is lost in the noise."""

Ints = Sequence[int]


def can_pack(dtype: torch.dtype) -> bool:
    return dtype != torch.float64 and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def convolve(
    tensor: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints
) -> Tensor:
    """As torch.nn.functional.conv2d and conv3d with one group, and a weight from `prepared`."""
    if not weight.is_mkldnn:
        return (F.conv2d, F.conv3d)[tensor.ndim - 4](tensor, weight, bias, stride, padding, dilation)
    operation: Any = torch.ops.mkldnn._convolution_pointwise
    return operation(tensor, weight, bias, padding, stride, dilation, 1, "none", [], "")


def prepared(
    weight: Tensor, kind: Hashable, make: Callable[[], Tensor], shape: Ints, stride: Ints, padding: Ints, dilation: Ints
) -> Tensor:
    """`make()`, a weight in the working dtype, in the order that convolving a tensor of this shape asks for.

    `kind` says what `make` does with `weight`; the result is kept for small pictures. It is for this very shape: in the
    order that another one asks for, a convolution can take many times as long.
    """

    def pack() -> Tensor:
        made = make()
        if made.device.type != "cpu" or not can_pack(made.dtype):
            return made
        operation: Any = torch.ops.mkldnn._reorder_convolution_weight
        return operation(made, list(padding), list(stride), list(dilation), 1, list(shape))

    positions = shape[0]
    for size in shape[2:]:
        positions *= size
    once = weight.device.type == "cpu" and positions >= KEEP_BELOW
    return (
        pack() if once else derived(weight, (kind, tuple(shape), tuple(stride), tuple(padding), tuple(dilation)), pack)
    )
