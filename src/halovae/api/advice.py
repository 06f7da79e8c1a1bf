"""What a caller can do where exact mode refuses a call: told only of what was tried, on shapes alone."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from halovae.base.errors import HalovaeError, InputError, NotExactError
from halovae.base.trees import is_picture, map_tensors, pictures_in
from halovae.calls.record import Recorder
from halovae.calls.target import Target
from halovae.tiles.blend import Blends
from halovae.tiles.tile_plan import Planner

_STEPS = (2, 4, 8, 16, 32, 64, 128)
"""What height and width of a picture may have to be multiples of."""


def advised(
    error: NotExactError, target: Target, half: str, ranks: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> HalovaeError:  # fmt: skip
    """A refusal of exact mode with its remedy, or what is wrong with the call where the VAE itself can't make it.

    Args:
        error: the refusal.
        target: the VAE.
        half: "encode" or "decode".
        ranks: how many would run tiles.
        args: of the call; pictures count by their size.
        kwargs: likewise.
    """
    height, width = pictures_in((args, kwargs))[0].shape[-2:]
    if not _takes(target, half, height, width, args, kwargs):
        sizes = ((_up(height, step), _up(width, step)) for step in _STEPS)
        fitting = next((size for size in dict.fromkeys(sizes) if _takes(target, half, *size, args, kwargs)), None)
        if fitting is not None:
            return InputError(
                f"{target.name}.{half} itself takes no {height} x {width}, on one rank either: "
                f"use {fitting[0]} x {fitting[1]}"
            )
    try:
        Planner(target, half, Blends(target.vae), ranks).plan(args, kwargs)
    except Exception:  # Whatever a model's own tiled method raises: then tiles are no remedy.
        return error
    return NotExactError(f"{str(error).rstrip('.')}. Use mode='tile' for this VAE")


def _takes(
    target: Target, half: str, height: int, width: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:  # fmt: skip
    """Whether the VAE itself runs pictures of this size through."""

    def sized(tensor: Tensor) -> Tensor:
        if not is_picture(tensor):
            return tensor
        return torch.empty((*tensor.shape[:-2], height, width), dtype=tensor.dtype, device="meta")

    try:
        recorder = Recorder(target.vae, half, functools.partial(target.run_untiled, half))
        recorder.record(map_tensors(sized, args), map_tensors(sized, kwargs))
    except Exception:  # Whatever it says, or what can't be followed on shapes.
        return False
    return True


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
