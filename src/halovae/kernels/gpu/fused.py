"""Chains of steps, norms and attention: one pass each where a kernel has that form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from halovae.base.private_torch import without_functions
from halovae.kernels.gpu import operators, support
from halovae.kernels.gpu.room_around import with_room
from halovae.kernels.memory_format import is_channels_last, memory_format
from halovae.kernels.precision import LOW
from halovae.kernels.shapes_only import alike

FEW_QUERIES = 1 << 12
"""Below, the pieces are too small for the library's products."""

NARROW_WIDTH = 128
"""The widest head for which the vendor has its fastest kernels."""

FEW_TOKENS = 1 << 9
"""Below, any kernel is fast enough."""

_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

FUSED_WIDTH = 256
"""The widest head for which the vendor has fast fused kernels."""


def chain(
    base: Tensor, dtype: torch.dtype, wide: torch.dtype, steps: Sequence[Any], shape: Sequence[int] | None = None
) -> Tensor:
    """The steps of a `Chain`, calculated in `wide`, rounded once to `dtype`: in one pass where they are of one form.

    The result may be asked for in another shape, whose positions follow each other in the same order.
    """
    if (form := _one_pass(base, wide, steps)) is None:
        found = step_by_step(base, dtype, wide, steps)
        if shape is None:
            return found
        return found.movedim(1, -1).reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return _run_chain(base, with_room(shape or base.shape, dtype, base.device), form)


def step_by_step(base: Tensor, dtype: torch.dtype, wide: torch.dtype, steps: Sequence[Any]) -> Tensor:
    """The same by torch's functions, one after the other, in one memory."""
    work = base.to(wide, copy=True, memory_format=memory_format(base.ndim, is_channels_last(base)))
    for step in steps:
        step.run(work)
    return work.to(dtype)


def sum_of(base: Tensor, dtype: torch.dtype, wide: torch.dtype, steps: Sequence[Any], other: Tensor) -> Tensor | None:
    """The steps of a `Chain`, and `other` added, in one pass; None where that is more than a bias and a sum."""
    form = _one_pass(base, wide, steps)
    if form is None or form.keys() - {"shift"}:
        return None
    out = with_room(base.shape, dtype, base.device, "sum")
    other = other.contiguous(memory_format=memory_format(base.ndim, True))
    return _run_chain(base, out, {**form, "other": flat_positions(other)})


def moments(picture: Tensor, groups: int, shift: Tensor | None) -> Tensor:
    """As `triton_norms.moments`, of pictures."""
    last = picture.contiguous(memory_format=memory_format(picture.ndim, True)).movedim(1, -1)
    return operators.moments(last.reshape(len(picture), -1, picture.shape[1]), groups, shift)


def affine(
    parts: Tensor, groups: int, channels: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    """As `triton_norms.affine`."""
    weight, bias = (None if p is None else alike(p, parts).contiguous() for p in (weight, bias))
    return operators.affine(parts, groups, channels, weight, bias, eps)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor | None:
    """Of `[N, heads, L, D]` by what is fastest; None where that is torch's own choice.

    One head that is too wide for the vendor's fused kernels goes through the library's products. For narrow heads the
    vendor's own kernel is asked for, which on Hopper is faster than the one that torch prefers (measured for 1,797
    tokens and heads of 64: 320 TFLOP/s beside 223).
    """
    if query.dtype not in LOW or query.is_meta or not support.supports(query.device):
        return None
    if (
        query.shape[3] <= NARROW_WIDTH
        and support.are_many(query.shape[2], FEW_TOKENS)
        and support.is_hopper(query.device)
    ):
        with sdpa_kernel(_BACKENDS, set_priority=True), without_functions():
            return F.scaled_dot_product_attention(query, key, value, scale=scale)
    wide = query.shape[3] > FUSED_WIDTH and query.shape[1] == key.shape[1] == value.shape[1] == 1
    if not wide or not support.are_many(query.shape[2], FEW_QUERIES):
        return None
    from halovae.kernels.gpu import triton_attention

    if not triton_attention.has_wide_products():
        return None
    return triton_attention.run(query.squeeze(1), key.squeeze(1), value.squeeze(1), scale).unsqueeze(1)


def _run_chain(base: Tensor, out: Tensor, form: dict[str, Any]) -> Tensor:
    base = base.contiguous(memory_format=memory_format(base.ndim, True))
    last = memory_format(out.ndim, True)
    if out.is_meta:
        whole = out if out.is_contiguous(memory_format=last) else getattr(out, "room", out)
        operators.chain(flat_positions(base), flat_positions(whole)[: len(flat_positions(base))], **form)
        return out
    from halovae.kernels.gpu import triton_chain

    if out.is_contiguous(memory_format=last):
        triton_chain.run(flat_positions(base), flat_positions(out), **form)
    else:
        height, width = out.shape[-2:]
        frames = (out.shape[2], out.stride(0), out.stride(2)) if out.ndim == 5 else (len(out), 0, out.stride(0))
        room = (height, width, *frames, out.stride(-2))
        triton_chain.run(flat_positions(base), out, **form, room=room)
    return out


def flat_positions(picture: Tensor) -> Tensor:
    """A channels-last picture as `[positions, C]`."""
    return picture.movedim(1, -1).reshape(-1, picture.shape[1])


_SLOTS = (
    ("shift", {"plus"}), ("normalize", {"normalize", "rms"}), ("times", {"times"}), ("plus", {"plus"}),
    ("by", {"times picture"}), ("more", {"plus picture"}), ("silu", {"silu"}),
)  # fmt: skip
"""Arguments of `triton_chain.run` in the order in which it uses them, and the kind of step that each of them is."""


def _one_pass(base: Tensor, wide: torch.dtype, steps: Sequence[Any]) -> dict[str, Any] | None:
    """Arguments for `triton_chain.run`; None where it does something else than these steps, or in another order."""
    if wide != torch.float32 or base.shape[1] == 1:
        return None
    form: dict[str, Any] = {}
    slots = iter(_SLOTS)
    for step in steps:
        name = next((name for name, kinds in slots if step.kind in kinds), None)
        value: Any = step.value
        if step.kind in ("normalize", "rms"):
            dim, value = value
            if dim != 1:
                return None
            form["mean"] = step.kind == "rms"
        elif step.kind == "silu":
            value = True
        elif step.kind.endswith("picture"):
            (frames, height, width), (time, down, across) = value.shape[2:], value.shifts
            spread = (frames, height, width, value.base.shape[2], value.first, time, down, across)
            if form.setdefault("spread", spread) != spread:
                return None
            value = flat_positions(value.base.contiguous(memory_format=memory_format(base.ndim, True)))
        elif isinstance(value, Tensor):
            value = by_channel(value, base)
        if name is None or value is None:
            return None
        form[name] = value
    return form


def by_channel(parameter: Tensor, base: Tensor) -> Tensor | None:
    """A parameter that broadcasts along everything but channels, as `[C]`, or for each picture, as `[N, C]`."""
    if parameter.ndim == base.ndim and parameter.shape[:2] == base.shape[:2] and {*parameter.shape[2:]} == {1}:
        return parameter.reshape(-1 if len(base) == 1 else len(base), base.shape[1])[
            0 if len(base) == 1 else slice(None)
        ]
    place = parameter.ndim - (base.ndim - 1)
    varies = parameter.numel() > 1
    if varies and (place < 0 or parameter.shape[place] != parameter.numel()):
        return None
    return parameter.flatten().expand(base.shape[1]).contiguous()
