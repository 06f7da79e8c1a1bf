"""The table of functions that have a faster way: one registered function for each.

A rule takes the arguments of the torch function and returns its result, or None where the way does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halovae.base.functions import registrar
from halovae.kernels.convolution import DTYPES
from halovae.kernels.gpu import support
from halovae.kernels.shapes_only import device_type

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}
rule = registrar(RULES)
"""Registers a rule for torch functions."""


def fits(tensor: Any) -> bool:
    """Whether the kernels are for this tensor: a picture or video in a floating dtype, on a device that has kernels."""
    return isinstance(tensor, Tensor) and tensor.ndim in (4, 5) and has_kernels(tensor)


def has_kernels(tensor: Tensor) -> bool:
    """Whether its device and dtype have kernels, and nobody asks for its gradient."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return False
    is_known = device_type(tensor.device) == "cpu" or support.supports(tensor.device)
    return is_known and tensor.dtype in DTYPES and 0 not in tensor.shape
