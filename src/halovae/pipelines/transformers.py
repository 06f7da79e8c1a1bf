"""The transformers of a pipeline: spread over ranks, with which attention, compiled or not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers import ContextParallelConfig, LTXVideoTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from halovae import comm
from halovae.base.errors import HalovaeError, InputError
from halovae.base.files import first_line
from halovae.base.private_diffusers import leave_whole, repeats_blocks, sharing_plan
from halovae.base.quiet import all_quiet
from halovae.base.replaced import replaced
from halovae.pipelines.generation_settings import Setup

_UNEVEN = "dimension to be sharded must be divisible"
"""In diffusers' assertion where a sequence can't be cut evenly."""
_MISMATCH = "must match the size of tensor"
"""In torch's error where a plan cuts one of two tensors that belong together."""
_NO_RING = "return_lse"
"""In diffusers' error where an attention gives no logarithms of its sums, which a ring needs."""


def denoisers(components: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a pipeline that denoise, by name: one or two transformers, or a U-Net."""
    return {
        name: part
        for name, part in components.items()
        if isinstance(part, nn.Module) and name.rstrip("_0123456789") in ("transformer", "unet")
    }


def prepare_denoisers(components: Mapping[str, Any], setup: Setup, ranks: int, device: torch.device) -> None:
    """Set the attention's backend, spread sequences over the ranks, compile: as `setup` asks. Called on every rank."""
    if setup.attention_backend is not None:
        check_backend(components, setup)
        for part in denoisers(components).values():
            _set_backend(part, setup.attention_backend)
    if degree(setup) > 1:
        check_degrees(components, setup)
        _spread(denoisers(components), setup, ranks, device)
    if setup.compile:
        for part in denoisers(components).values():
            (part.compile_repeated_blocks if repeats_blocks(part) else part.compile)()


def degree(setup: Setup) -> int:
    """How many ranks share one sequence."""
    return setup.ulysses_degree * setup.ring_degree


def check_backend(components: Mapping[str, Any], setup: Setup) -> None:
    """Refuse an attention that diffusers does not know, or a denoiser that has no choice."""
    name = setup.attention_backend
    if name is None:
        return
    for part in denoisers(components).values():
        if not hasattr(part, "set_attention_backend"):
            raise InputError(
                f"--attention-backend can't be honoured: {type(part).__name__} has no choice of attention; leave it out"
            )
    names = sorted(backend.value for backend in AttentionBackendName)
    if name.lower() not in names:
        raise InputError(f"--attention-backend {name}: there is none of that name; use one of {', '.join(names)}")


def _set_backend(part: Any, name: str) -> None:
    try:
        with all_quiet():
            part.set_attention_backend(name)
    except Exception as error:  # Missing packages, other devices: each has its own kind.
        raise InputError(f"--attention-backend {name}: {first_line(error)}") from error


def check_degrees(components: Mapping[str, Any], setup: Setup) -> None:
    """Refuse to spread what can't be spread, from the parts' configs alone."""
    if degree(setup) == 1:
        return
    for part in denoisers(components).values():
        if sharing_plan(part) is None or not hasattr(part, "enable_parallelism"):
            raise InputError(
                f"{_asked(setup)} can't be honoured: diffusers {diffusers.__version__} has no plan to spread "
                f"{type(part).__name__}; leave it out (the VAE uses all ranks all the same)"
            )
        _check_heads(part, setup.ulysses_degree)


def _asked(setup: Setup) -> str:
    return "--ulysses-degree" if setup.ulysses_degree > 1 else "--ring-degree"


def _spread(parts: Mapping[str, Any], setup: Setup, ranks: int, device: torch.device) -> None:
    # Further ranks hold copies of the same shares.
    shape = (ranks // degree(setup), setup.ring_degree, setup.ulysses_degree)
    mesh = comm.mesh(device.type, shape, ("copy", "ring", "ulysses"))
    for part in parts.values():
        config = ContextParallelConfig(ring_degree=shape[1], ulysses_degree=shape[2], mesh=mesh)
        try:
            with all_quiet(), some_device():
                part.enable_parallelism(config=config, cp_plan=spread_plan(part))
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"{_asked(setup)}: {first_line(error)}") from error
        keep_text_whole(part)


def _check_heads(part: Any, ulysses: int) -> None:
    heads = part.config.get("num_attention_heads")
    if isinstance(heads, int) and heads % ulysses:
        allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise InputError(
            f"--ulysses-degree {ulysses} does not divide the {heads} attention heads of {type(part).__name__}: "
            f"use one of {allowed}"
        )


@contextmanager
def shared_sequences(parts: int) -> Iterator[None]:
    """Within it, a sequence that `parts` ranks can't share is an error of the caller's, not of the code's.

    A sequence (of text, say) may have a length that `parts` does not divide, the attention's backend may not pass keys
    and values around, or diffusers' plan for this transformer does not work out.
    """
    try:
        yield
    except AssertionError as error:
        if _UNEVEN not in str(error):
            raise
        raise InputError(
            f"a sequence of the transformer (the text's, where not the picture's) has a length that {parts} ranks "
            f"can't share evenly: choose another --height, --width or --prompt, or a lower degree"
        ) from error
    except RuntimeError as error:
        if parts == 1 or _MISMATCH not in str(error) or isinstance(error, HalovaeError):
            raise
        raise InputError(
            f"--ulysses-degree and --ring-degree can't be honoured: the plan of diffusers {diffusers.__version__} to "
            f"spread this transformer fails ({first_line(error)}); leave them out (the VAE uses all ranks all the same)"
        ) from error
    except ValueError as error:
        if _NO_RING not in str(error):
            raise
        raise InputError(
            "--ring-degree can't be honoured with this attention: choose another --attention-backend (on NVIDIA GPUs "
            "_native_cudnn or _native_flash, with bfloat16), or use --ulysses-degree"
        ) from error


def patch(components: Mapping[str, Any], latent_channels: int) -> tuple[int, int]:
    """Latent frames, and rows or columns of latents, that make one token of the first denoiser; (1, 1) if unknown.

    Pipelines that pack a square of latents into channels before the transformer say it by its number of channels.
    """
    part = next(iter(denoisers(components).values()), None)
    config = getattr(part, "config", {})
    size: Any = config.get("patch_size") or 1
    frames = config.get("patch_size_t") or (size[0] if isinstance(size, (tuple, list)) and len(size) == 3 else 1)
    side = size[-1] if isinstance(size, (tuple, list)) else size
    packed = math.isqrt(max(1, int(config.get("in_channels") or 1) // latent_channels))
    if packed * packed * latent_channels == config.get("in_channels"):
        side = max(side, packed)
    return int(frames), int(side)


# ---- what diffusers does wrong when it spreads a transformer: each says for which versions it is needed --------------


@contextmanager
def some_device() -> Iterator[None]:
    """Within it, torch counts at least one accelerator.

    diffusers 0.36 to 0.42 (at least) takes a rank modulo the number of accelerators, also where the work runs on the
    CPU and there is none.
    """
    count = torch.accelerator.device_count
    with replaced(torch.accelerator, "device_count", lambda: max(1, count())):
        yield


def spread_plan(part: Any) -> dict[str, Any]:
    """The plan to spread a transformer by: its class's own, or the one that should be its own.

    diffusers 0.36 to 0.42 (at least) cuts LTX's text and the text's mask, but not the noise levels, of which
    image-to-video has one for each token. Attention brings the pieces of the text together again, and not those of
    the mask. Here the noise levels are cut with their tokens, and the text is left whole: see `keep_text_whole`.
    """
    plan = sharing_plan(part) or {}
    if not _plan_fails(part):
        return plan
    tokens = plan[""]["hidden_states"]
    return {**plan, "": {"hidden_states": tokens, "timestep": replace(tokens, expected_dims=2)}}


def keep_text_whole(part: Any) -> None:
    """Where `spread_plan` leaves the text whole, the attention to it has nothing to exchange. After spreading."""
    if not _plan_fails(part):
        return
    for block in part.transformer_blocks:
        block.attn2.processor = copy(block.attn2.processor)
        leave_whole(block.attn2.processor)


def _plan_fails(part: Any) -> bool:
    if not issubclass(type(part), LTXVideoTransformer3DModel):
        return False
    plan = sharing_plan(part)
    return plan is not None and "timestep" not in plan[""]
