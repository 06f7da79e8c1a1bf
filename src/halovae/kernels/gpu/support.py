"""Whether there are kernels for a device."""

from __future__ import annotations

import functools
import importlib.util

import torch

from halovae.kernels.shapes_only import device_type


def supports(device: torch.device) -> bool:
    """Whether there are kernels for this device: Triton has to be there, as it is with torch for CUDA and ROCm."""
    return device_type(device) == "cuda" and _has_triton()


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
