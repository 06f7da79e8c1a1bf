"""What a caller can do where a call fails for what it was given: told only of what was tried, on shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from halovae.base.errors import HalovaeError, InputError, NotExactError, counted
from halovae.base.memory import is_shortage
from halovae.base.options import NETWORKS
from halovae.base.trees import is_picture, map_tensors, pictures_in
from halovae.calls.record import Recorder
from halovae.calls.target import Target
from halovae.kernels.shapes_only import standing_in
from halovae.tiles.blend import Blends
from halovae.tiles.tile_plan import Planner

_STEPS = (2, 4, 8, 16, 32, 64, 128)
"""What height and width of a picture may have to be multiples of."""
_CHANNELS = 1024
"""More than pictures and latents have."""

Kind = tuple[tuple[int, ...], torch.dtype]
"""Of a picture."""
Change = Callable[[Kind], Kind]


def explained(
    error: Exception, target: Target, half: str, ranks: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Exception:  # fmt: skip
    """What is wrong with a call that has failed, and what would be right; the failure itself where that is not known.

    Args:
        error: the failure, on this rank.
        target: the VAE.
        half: "encode" or "decode".
        ranks: how many would run tiles.
        args: of the call; pictures count by their shape and dtype.
        kwargs: likewise.
    """
    is_refused, cause = isinstance(error, NotExactError), error
    if isinstance(error, InputError) and isinstance(error.__cause__, Exception):  # It is halovae that has tried.
        cause = error.__cause__
    pictures = pictures_in((args, kwargs))
    if not pictures or (not is_refused and (isinstance(cause, HalovaeError) or is_shortage(cause))):
        return error
    takes = functools.partial(_takes, target, half, args, kwargs)
    if not takes(lambda kind: kind):
        for what, remedy, change in _others(target, half, pictures[0]):
            if takes(change):
                where = ", on one rank either" if ranks > 1 else ""
                return InputError(f"{target.name}.{half} itself takes no {what}{where}: {remedy}")
    if not is_refused:
        return error
    try:
        Planner(target, half, Blends(target.vae), ranks).plan(args, kwargs)
    except Exception:  # Whatever a model's own tiled method raises: then tiles are no remedy.
        return error
    return NotExactError(f"{str(error).rstrip('.')}. Use mode='tile' for this VAE")


def _others(target: Target, half: str, picture: Tensor) -> Iterator[tuple[str, str, Change]]:
    """Other pictures that may be right: what is wrong then, what to do, and how a picture becomes one."""
    shape, dtype = tuple(picture.shape), picture.dtype
    height, width = shape[-2:]

    def shaped(*other: int) -> Change:
        return lambda kind: (other, kind[1]) if kind[0] == shape else kind

    if (wanted := _dtype(target, half)) and wanted != dtype:
        given, own = (str(each).removeprefix("torch.") for each in (dtype, wanted))
        yield given, f"use {own}, as its weights are", lambda kind: (kind[0], wanted if kind[1] == dtype else kind[1])
    if len(shape) == 4:
        words = "4-dimensional picture", "give (batch, channels, frames, height, width)"
        yield *words, shaped(*shape[:2], 1, height, width)
        yield *words, shaped(1, *shape)
    else:
        yield "5-dimensional picture", "give (batch, channels, height, width)", shaped(*shape[:2], height, width)
    for size in dict.fromkeys((_up(height, step), _up(width, step)) for step in _STEPS):
        yield f"{height} x {width}", f"use {size[0]} x {size[1]}", functools.partial(_sized, size)
    for count in _channels(target):
        yield counted(shape[1], "channel"), f"use {count}", shaped(shape[0], count, *shape[2:])


def _channels(target: Target) -> Iterable[int]:
    """How many channels the pictures of a VAE may have."""
    config = getattr(target.vae, "config", None)
    named = dict(config).values() if isinstance(config, Mapping) else ()
    weights = (weight.shape[1] for weight in target.vae.parameters() if weight.ndim in (4, 5))
    return dict.fromkeys(count for count in (*named, *weights) if type(count) is int and 0 < count <= _CHANNELS)


def _dtype(target: Target, half: str) -> torch.dtype | None:
    network = getattr(target.vae, NETWORKS[half], target.vae)
    return next((weight.dtype for weight in network.parameters() if weight.is_floating_point()), None)


def _takes(target: Target, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], change: Change) -> bool:
    """Whether the VAE itself runs pictures of another kind through."""

    def changed(tensor: Tensor) -> Tensor:
        if not is_picture(tensor):
            return tensor
        shape, dtype = change((tuple(tensor.shape), tensor.dtype))
        return torch.empty(shape, dtype=dtype, device="meta")

    device = pictures_in((args, kwargs))[0].device
    try:
        recorder = Recorder(target.vae, half, functools.partial(target.run_untiled, half))
        with standing_in(device):  # Autocast is of a device.
            recorder.record(map_tensors(changed, args), map_tensors(changed, kwargs))
    except Exception:  # Whatever it says, or what can't be followed on shapes.
        return False
    return True


def _sized(size: tuple[int, int], kind: Kind) -> Kind:
    return (*kind[0][:-2], *size), kind[1]


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
