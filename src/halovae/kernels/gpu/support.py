"""Whether there are kernels for a device, and whether they pay for so much work."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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


def are_many(count: int, least: int) -> bool:
    """Whether there is so much work that a kernel pays."""
    return count >= least or _is_large.get()


_is_large: ContextVar[bool] = ContextVar("_is_large", default=False)


@contextmanager
def as_if_large() -> Iterator[None]:
    """Within it, a small picture gets the kernels of a large one."""
    token = _is_large.set(True)
    try:
        yield
    finally:
        _is_large.reset(token)
