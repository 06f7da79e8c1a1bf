"""Trust, but verify: a small probe through the un-parallel VAE and through the shards, compared.

The probe also measures how much the encoder compresses in space, which no attribute tells for every VAE.
"""

from __future__ import annotations

import functools
import logging
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halovae.base import verdicts
from halovae.base.compiled import as_written
from halovae.base.errors import InputError, NotExactError, VerificationError
from halovae.base.memory import is_shortage
from halovae.base.trees import is_picture, map_tensors, on_meta, pictures_in
from halovae.calls.blueprint import code_words
from halovae.calls.dataflow import Remembered
from halovae.calls.randomness import frozen_generators
from halovae.calls.state import has_hooks, kept_tensors, unchanged, without_fetching, without_hooks
from halovae.calls.target import Call, Target
from halovae.exact.mesh import Mesh, plan_shards
from halovae.exact.run import Bounds, first_tensor, gather, run_sharded
from halovae.kernels import autocast
from halovae.kernels.precision import shortens

LOG = logging.getLogger("halovae")

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
    """Pixels per latent along height and width, measured by encoding zeros: on shapes alone where the code allows it.

    Args:
        picture: what is going to be encoded; its channels, frames, dtype and device count.

    Raises:
        VerificationError: the VAE encodes no small square picture.
    """
    frames = {_short(picture.shape[2]), picture.shape[2]} if picture.ndim == 5 else {0}
    code = code_words(target.vae)
    asked = picture.shape[1], min(frames), picture.dtype, autocast.state()
    name = code and verdicts.name_of(picture.device, "ratio", *asked, code)
    ratio = verdicts.read(name)
    if not isinstance(ratio, int):
        ratio = _tried_compression(target, picture, sorted(frames))
        verdicts.write(name, ratio)
    return ratio


def _tried_compression(target: Target, picture: Tensor, frames: Sequence[int]) -> int:
    failure: Exception | None = None
    for size in _RATIO_SIZES:
        for count in frames:
            zeros = picture.new_zeros((1, picture.shape[1], *([count] if count else []), size, size))
            try:
                return max(1, round(size / _encoded_width(target, zeros)))
            except NotExactError:
                raise
            except Exception as error:  # Of the first size too: a failure of another kind is seen there.
                if is_shortage(error):
                    raise
                failure = failure or error
    assert failure is not None
    _check_call(target, "encode", (picture,), {}, failure)
    left = _left_in(target.vae)
    raise VerificationError(f"{target.name} encodes no picture of {_RATIO_SIZES} pixels: {failure}{left}") from failure


def _encoded_width(target: Target, picture: Tensor) -> int:
    try:
        latent = _on_shapes(target, "encode", (picture,), {})
    except Exception:  # Whatever a model's code raises where a value should be.
        latent, _ = tried(target.vae, picture.device, lambda: target.run_untiled("encode", picture))
    return first_tensor(latent).shape[-1]


def _on_shapes(target: Target, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    device = pictures_in((args, kwargs))[0].device
    args, kwargs = on_meta(args), on_meta(kwargs)
    with torch.inference_mode(False), as_written(), without_fetching(target.vae), Remembered():
        return tried(target.vae, device, lambda: target.run_untiled(half, *args, **kwargs), hooks=False)[0]


def _check_call(
    target: Target, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], failure: Exception
) -> None:  # fmt: skip
    """What failed for a small picture may fail for the caller's as well, and then nothing is wrong with the small one.

    Raises:
        InputError: the VAE's code ends at the same place for the caller's arguments, on shapes alone.
    """
    try:
        _on_shapes(target, half, args, kwargs)
    except Exception as error:  # Whatever the VAE's code raises.
        where = traceback.extract_tb(failure.__traceback__)[-1]
        if any((frame.filename, frame.lineno) == (where.filename, where.lineno)
               for frame in traceback.extract_tb(error.__traceback__)):  # fmt: skip
            raise InputError(
                f"{target.name}.{half} itself does not take what it was called with, on one rank either: {failure}"
            ) from error


def tried(vae: nn.Module, device: torch.device, run: Callable[[], Any], hooks: bool | None = None) -> tuple[Any, bool]:
    """What a trial gives, and whether hooks on submodules took part. It leaves no trace in the VAE and in generators.

    Args:
        hooks: whether hooks take part; None: where it fails without them, as some of them put weights in place.
    """
    try:
        with frozen_generators(device), unchanged(vae), nullcontext() if hooks else without_hooks(vae):
            return run(), bool(hooks)
    except Exception as error:
        if hooks is not None or isinstance(error, NotExactError) or is_shortage(error) or not has_hooks(vae):
            raise
    return tried(vae, device, run, hooks=True)


def _left_in(vae: nn.Module) -> str:
    """What to know where a small picture fails: a VAE may go on with what an earlier call has left in it."""
    own = set(map(id, vae.buffers()))
    left = any(is_picture(tensor) and id(tensor) not in own for tensor in kept_tensors(vae))
    return (
        ". It keeps tensors of earlier calls, which smaller pictures don't fit: clear its caches first" if left else ""
    )


@dataclass(frozen=True)
class Probe:
    """Small arguments of the same kind as a call's, and where to cut them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bounds: Bounds

    @property
    def device(self) -> torch.device:
        return pictures_in((self.args, self.kwargs))[0].device

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies of the arguments: no run uses up another run's random numbers, or finds what it has written."""
        return map_tensors(_copied, (self.args, self.kwargs), (Tensor, torch.Generator))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    copy = torch.Generator(value.device)
    copy.set_state(value.get_state())
    return copy


def make_probe(
    shape: tuple[int, int], ratio: int, args: tuple[Any, ...], kwargs: dict[str, Any], more_frames: int = 0,
    scales: Sequence[float] = (),
) -> Probe:  # fmt: skip
    """Shrink the pictures in the arguments to a few latents per shard, as uneven as the cut allows.

    Of a video, a few frames are left, and `more_frames` if it has so many.

    Height and width differ, and both differ from every number of shards, so that no mistake hides behind equal sizes.

    Args:
        scales: by how much the noise of each picture is multiplied (`scales_of`); without them it is of variance one.
    """
    rows, cols = 2 * shape[0] + 1, 2 * shape[1] + 2
    plan = plan_shards(ratio * rows, ratio * cols, ratio, shape[0] * shape[1], shape)
    return shrunk(plan.bounds, args, kwargs, more_frames, scales)


def shrunk(
    bounds: Bounds, args: tuple[Any, ...], kwargs: dict[str, Any], more_frames: int = 0, scales: Sequence[float] = ()
) -> Probe:  # fmt: skip
    """Noise of a few frames, so large as the last bounds, in place of the pictures in the arguments."""
    main = pictures_in((args, kwargs))[0]
    generator = torch.Generator().manual_seed(0)
    factors = iter(scales)

    def shrink(value: Tensor) -> Tensor:
        if not is_picture(value):
            return value
        size = [max(1, cuts[-1] * value.shape[d] // main.shape[d]) for cuts, d in zip(bounds, (-2, -1), strict=True)]
        middle = [min(value.shape[2], _short(value.shape[2]) + more_frames)] if value.ndim == 5 else []
        # By name, as the caller may have set another default device.
        noise = torch.randn((*value.shape[:2], *middle, *size), generator=generator, device="cpu")
        noise = noise * next(factors, 1.0) if value.is_floating_point() else noise > 0
        return noise.to(device=value.device, dtype=value.dtype)

    small_args, small_kwargs = map_tensors(shrink, (args, kwargs))
    return Probe(small_args, small_kwargs, bounds)


def scales_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float]:
    """The root mean squares of the pictures in the arguments of a call; 1 for one that is zero throughout."""
    found: list[float] = []
    for picture in pictures_in((args, kwargs)):
        norm = _norm(picture) if picture.is_floating_point() else 0.0
        if not math.isfinite(norm):
            norm = _norm(torch.nan_to_num(picture, nan=0.0, posinf=0.0, neginf=0.0))
        found.append(norm / picture.numel() ** 0.5 or 1.0)
    return found


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)))


@dataclass(frozen=True)
class Alone:
    """What the un-parallel VAE makes of a probe."""

    result: Tensor
    hooks: bool
    """Whether hooks on submodules took part: it fails without them."""

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.result).all())


def run_alone(target: Target, half: str, probe: Probe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Alone:
    """The un-parallel result of the probe of a call with these arguments.

    Raises:
        InputError: the VAE can't make that call.
        VerificationError: the VAE can't run the probe.
    """
    call = functools.partial(target.run_untiled, half)
    try:
        result, hooks = tried(target.vae, probe.device, lambda: _called(call, probe))
    except NotExactError:
        raise
    except Exception as error:
        if is_shortage(error):
            raise
        _check_call(target, half, args, kwargs, error)
        raise VerificationError(
            f"the un-parallel {half} of {target.name} can't run the probe, a smaller picture, so it can't be compared: "
            f"{error}{_left_in(target.vae)}. Pass verify=False to go without"
        ) from error
    return Alone(first_tensor(result), hooks)


def _called(call: Call, probe: Probe) -> Any:
    args, kwargs = probe.fresh()
    return call(*args, **kwargs)


def verify(mesh: Mesh, target: Target, half: str, probe: Probe, alone: Alone) -> VerificationError | None:
    """Compare the un-parallel and the sharded result of a probe.

    Returns:
        None, or what to raise once all ranks have come to this verdict: they differ, and in which submodule first.
    """
    call = functools.partial(target.run_untiled, half)

    def on_shards() -> Any:
        found = run_sharded(mesh, call, *probe.fresh(), probe.bounds)
        return map_tensors(lambda t: gather(mesh, t), found)

    expected, found = alone.result, first_tensor(tried(target.vae, probe.device, on_shards, alone.hooks)[0])
    gap = distance(found, expected)
    if gap <= allowed(expected):
        if not torch.isfinite(expected).any():
            LOG.warning(
                "%s of %s gives only NaN and infinity for a small probe, un-parallel too%s: nothing was compared",
                half, target.name, _cause(expected.dtype),
            )  # fmt: skip
        return None
    culprit = _first_difference(mesh, target.vae, call, probe, alone.hooks)
    bad = [int((~torch.isfinite(result)).sum()) for result in (expected, found)]
    values = (
        f" ({bad[0]} of {expected.numel()} values are not finite un-parallel, {bad[1]} on shards" if any(bad) else ""
    )
    return VerificationError(
        f"{half} of {target.name} on shards differs from the un-parallel one by {gap:.1e} "
        f"(allowed {allowed(expected):.0e}){values and values + _cause(expected.dtype) + ')'}; "
        f"the first submodule that differs is {culprit}"
    )


def _cause(dtype: torch.dtype) -> str:
    """Why numbers are not finite, as far as the dtype tells, and what to do."""
    return ": float16 overflows in this VAE, use float32 or bfloat16" if dtype == torch.float16 else ""


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance of what is finite; infinite where the shapes differ, or where what is not finite does."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.double(), expected.double()
    alike = (found == expected) | (found.isnan() & expected.isnan())
    gap = torch.nan_to_num((found - expected).masked_fill(alike, 0.0), nan=torch.inf, posinf=torch.inf)
    whole = torch.linalg.vector_norm(expected.masked_fill(~expected.isfinite(), 0.0))
    return float(torch.linalg.vector_norm(gap) / whole.clamp_min(1e-30))


def is_rounding(found: Tensor, expected: Tensor) -> bool:
    """Whether results of the same kernels on one device are the same up to rounding."""
    tells = bool(torch.isfinite(expected).any())  # NaN throughout may be anything.
    return tells and distance(found, expected) <= _STRICTER * allowed(found)


def allowed(result: Tensor) -> float:
    """How far results may be apart: by their precision, or by that to which autocast has brought what is inside."""
    inside = autocast.dtype_of(result.device) if result.dtype != torch.float64 else None
    if inside is None and result.dtype == torch.float32 and shortens(result.device):
        inside = torch.float16  # as many bits
    return max(TOLERANCE.get(dtype, 1e-1) for dtype in (result.dtype, inside) if dtype)


def _first_difference(mesh: Mesh, vae: nn.Module, call: Call, probe: Probe, hooks: bool) -> str:
    plain: list[tuple[str, Tensor]] = []
    sharded: list[tuple[str, Tensor]] = []

    def alone() -> None:
        with _outputs(vae, plain, lambda t: t):
            _called(call, probe)

    def on_shards() -> None:
        with _outputs(vae, sharded, lambda t: gather(mesh, t)):
            run_sharded(mesh, call, *probe.fresh(), probe.bounds)

    tried(vae, probe.device, alone, hooks)
    tried(vae, probe.device, on_shards, hooks)
    for (name, expected), (_, found) in zip(plain, sharded, strict=False):
        if distance(found, expected) > allowed(expected):
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
