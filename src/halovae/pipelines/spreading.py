"""What diffusers does wrong when it spreads a transformer, worked around here and nowhere else.

Each says for which versions it is needed, and does nothing where diffusers has mended it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel

from halovae.base.private_diffusers import leave_whole, sharing_plan
from halovae.base.replaced import replaced


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
