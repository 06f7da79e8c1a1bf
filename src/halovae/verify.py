"""Trust, but verify: a small probe through the un-parallel VAE and through the shards, compared.

The probe also measures how much the encoder compresses in space, which no attribute tells for every VAE.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halovae.errors import NotExactError, VerificationError
from halovae.exact.mesh import Mesh
from halovae.exact.partition import Bounds, first_tensor, gather
from halovae.exact.run import run_sharded
from halovae.memory import is_shortage
from halovae.plan import plan_shards
from halovae.randomness import frozen_generators
from halovae.state import undone_by_failure
from halovae.target import Call, Target
from halovae.trees import is_picture, map_tensors

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest relative L2 distance of the probe's two results. Rounding stays 10 times below: some VAEs compute in
float32 inside, and low precisions add up over a hundred layers. A wrong halo is well above: it changes whole rows."""

_STRICTER = 0.3
"""Than shards are compared where the same kernels run on the same device, so that only roundings differ."""

_RATIO_SIZES = (64, 128, 256)
"""Pixels to measure the compression at: the smallest that the VAE takes."""


def _short(frames: int) -> int:
    """A smaller number of frames that starts and ends a causal VAE's chunks as `frames` does."""
    return frames if frames <= 9 else (frames - 1) % 8 + (9 if (frames - 1) % 8 < 1 else 1)


def compression(target: Target, picture: Tensor) -> int:
    """Pixels per latent along height and width, measured by encoding zeros.

    Args:
        target: the VAE.
        picture: what is going to be encoded; its channels, frames, dtype and device count.

    Raises:
        VerificationError: the VAE encodes no small square picture.
    """
    failure: Exception | None = None
    frames = {_short(picture.shape[2]), picture.shape[2]} if picture.ndim == 5 else {0}
    for size in _RATIO_SIZES:
        for count in sorted(frames):
            shape = (1, picture.shape[1], *([count] if count else []), size, size)
            try:
                with frozen_generators(picture.device), undone_by_failure(target.vae):
                    latent = first_tensor(target.run_untiled("encode", picture.new_zeros(shape)))
                return max(1, round(size / latent.shape[-1]))
            except NotExactError:
                raise
            except Exception as error:  # Of the first size too: a failure of another kind is seen there.
                if is_shortage(error):
                    raise
                failure = failure or error
    raise VerificationError(f"{target.name} encodes no picture of {_RATIO_SIZES} pixels: {failure}") from failure


@dataclass(frozen=True)
class Probe:
    """Small arguments of the same kind as a call's, and where to cut them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bounds: Bounds

    @property
    def device(self) -> torch.device:
        return first_tensor([*self.args, *self.kwargs.values()]).device

    def fresh_args(self) -> tuple[Any, ...]:
        """The arguments; a generator as a copy, so that no run uses up the caller's or another run's numbers."""
        return tuple(map(_copied_generator, self.args))

    def fresh_kwargs(self) -> dict[str, Any]:
        return {name: _copied_generator(value) for name, value in self.kwargs.items()}


def _copied_generator(value: Any) -> Any:
    if not isinstance(value, torch.Generator):
        return value
    copy = torch.Generator(value.device)
    copy.set_state(value.get_state())
    return copy


def make_probe(
    shape: tuple[int, int], ratio: int, args: tuple[Any, ...], kwargs: dict[str, Any], more_frames: int = 0
) -> Probe:
    """Shrink the pictures in the arguments to a few latents per shard, as uneven as the cut allows.

    Of a video, a few frames are left, and `more_frames` if it has so many.

    Height and width differ, and both differ from every number of shards, so that no mistake hides behind equal sizes.
    """
    main = next(value for value in (*args, *kwargs.values()) if is_picture(value))
    rows, cols = 2 * shape[0] + 1, 2 * shape[1] + 2
    generator = torch.Generator().manual_seed(0)

    def shrink(value: Any) -> Any:
        if not is_picture(value):
            return value
        size = [ratio * n * value.shape[d] // main.shape[d] for n, d in ((rows, -2), (cols, -1))]
        middle = [min(value.shape[2], _short(value.shape[2]) + more_frames)] if value.ndim == 5 else []
        noise = torch.randn((*value.shape[:2], *middle, *size), generator=generator)
        return noise.to(device=value.device, dtype=value.dtype)

    plan = plan_shards(ratio * rows, ratio * cols, ratio, shape[0] * shape[1], shape)
    return Probe(tuple(map(shrink, args)), {name: shrink(value) for name, value in kwargs.items()}, plan.bounds)


def verify(mesh: Mesh, target: Target, half: str, probe: Probe) -> VerificationError | None:
    """Compare the un-parallel and the sharded result of a probe.

    Returns:
        None, or what to raise once all ranks have come to this verdict: they differ, and in which submodule first.

    Raises:
        VerificationError: the probe can't run.
    """
    call = functools.partial(target.run_untiled, half)
    try:
        with frozen_generators(probe.device):
            expected = call(*probe.fresh_args(), **probe.fresh_kwargs())
    except NotExactError:
        raise
    except Exception as error:
        if is_shortage(error):
            raise
        raise VerificationError(
            f"the un-parallel {half} of {target.name} can't run the probe, so it can't be compared: {error}. "
            "Pass verify=False to go without"
        ) from error
    with frozen_generators(probe.device):
        found = run_sharded(mesh, call, probe.fresh_args(), probe.fresh_kwargs(), probe.bounds)
        found = map_tensors(lambda t: gather(mesh, t), found)
    expected, found = first_tensor(expected), first_tensor(found)
    if distance(found, expected) <= TOLERANCE.get(expected.dtype, 1e-1):
        return None
    culprit = _first_difference(mesh, target.vae, call, probe)
    return VerificationError(
        f"{half} of {target.name} on shards differs from the un-parallel one by {distance(found, expected):.1e} "
        f"(allowed {TOLERANCE.get(expected.dtype, 1e-1):.0e}); the first submodule that differs is {culprit}"
    )


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance; infinite where the shapes differ or only one result is finite."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.double(), expected.double()
    gap = torch.linalg.vector_norm(torch.nan_to_num(found - expected, nan=float("inf")))
    return float(gap / torch.linalg.vector_norm(expected).clamp_min(1e-30))


def is_rounding(found: Tensor, expected: Tensor) -> bool:
    """Whether results of the same kernels on one device are the same up to rounding."""
    return distance(found, expected) <= _STRICTER * TOLERANCE.get(found.dtype, 1e-1)


def _first_difference(mesh: Mesh, vae: nn.Module, call: Call, probe: Probe) -> str:
    plain: list[tuple[str, Tensor]] = []
    sharded: list[tuple[str, Tensor]] = []
    with frozen_generators(probe.device), _outputs(vae, plain, lambda t: t):
        call(*probe.fresh_args(), **probe.fresh_kwargs())
    with frozen_generators(probe.device), _outputs(vae, sharded, lambda t: gather(mesh, t)):
        run_sharded(mesh, call, probe.fresh_args(), probe.fresh_kwargs(), probe.bounds)
    for (name, expected), (_, found) in zip(plain, sharded, strict=False):
        if distance(found, expected) > TOLERANCE.get(expected.dtype, 1e-1):
            return name
    return "none: the difference arises outside the submodules"


@contextmanager
def _outputs(vae: nn.Module, seen: list[tuple[str, Tensor]], take: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Record every submodule's output, in the order of the calls."""

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if is_picture(output):
                seen.append((name, take(output)))

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in vae.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
