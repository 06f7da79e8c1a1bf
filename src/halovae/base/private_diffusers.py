"""Names that diffusers and accelerate do not promise to keep, each with what it is for. See tests/test_private.py."""

from __future__ import annotations

from typing import Any

from torch import nn

HOOK_OF_ACCELERATE = "_hf_hook"
"""Attribute of a module that accelerate has put a hook around: weights come when it runs, or are elsewhere."""
HOOK_OF_DIFFUSERS = "_diffusers_hook"
"""Likewise, of diffusers: groups of weights that are moved, a cache, a layerwise dtype."""
OLD_FORWARD = "_old_forward"
"""Attribute that keeps the module's own forward while accelerate's stands in its place."""
LIBRARY_HOOKS = frozenset((HOOK_OF_ACCELERATE, HOOK_OF_DIFFUSERS))


def has_library_hook(module: nn.Module) -> bool:
    """Whether a library has put itself around a module."""
    return not LIBRARY_HOOKS.isdisjoint(vars(module))


def sharing_plan(part: Any) -> dict[str, Any] | None:
    """How a transformer's inputs and outputs are cut for several ranks; None: it can't be spread."""
    return getattr(part, "_cp_plan", None)


def repeats_blocks(part: Any) -> bool:
    """Whether a transformer names blocks that are compiled once for all."""
    return bool(getattr(part, "_repeated_blocks", None))


def leave_whole(processor: Any) -> None:
    """Let an attention exchange nothing with other ranks, which `enable_parallelism` has set it up for."""
    processor._parallel_config = None


def siblings(package: Any) -> list[str]:
    """Names of all that a package of one family's pipelines has, without loading it."""
    return [name for group in getattr(package, "_import_structure", {}).values() for name in group]


def optional_parts(pipeline: Any) -> set[str]:
    """Parts that a class of pipelines does without."""
    return set(pipeline._optional_components)


def needed_parts(pipeline: Any) -> set[str]:
    """Parts that the `__init__` of a class of pipelines takes."""
    return set(pipeline._get_signature_keys(pipeline)[0])
