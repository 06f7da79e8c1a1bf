"""A tensor that somebody else is going to compute: known by shape, and joined to others before it is there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halovae.base.functions import outside_modes
from halovae.kernels.lazy.deferred import Deferred, recipe_of
from halovae.kernels.memory_format import is_channels_last


@dataclass
class Promise:
    """A recipe that waits for its value."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    channels_last: bool
    value: Tensor | None = None

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return ()

    def compute(self) -> Tensor:
        """The value.

        Raises:
            RuntimeError: it is not there yet.
        """
        if self.value is None:
            raise RuntimeError(f"a tensor {self.shape} was read before it was computed")
        return self.value


@outside_modes
def promised(like: Tensor) -> Deferred:
    """A tensor of the same shape and kind; its recipe takes the value."""
    return Deferred(Promise(tuple(like.shape), like.dtype, like.device, is_channels_last(like)))


def kept(tensor: Tensor) -> Tensor | None:
    """The value of a promised tensor, None as long as there is none; of any other tensor, the tensor."""
    if isinstance(tensor, Deferred) and tensor.value is not None:
        return tensor.value
    recipe = recipe_of(tensor)
    return recipe.value if isinstance(recipe, Promise) else tensor
