"""The scheduler's shift, and the point where a second expert takes over."""

from __future__ import annotations

from typing import Any

from halovae.errors import InputError
from halovae.pipelines.settings import Setup

_SHIFTS = ("flow_shift", "shift")


def prepare_scheduler(pipeline: Any, setup: Setup) -> None:
    """Set what `setup` asks for.

    Raises:
        InputError: this pipeline's scheduler has no shift, or the pipeline has one expert only.
    """
    if setup.flow_shift is not None:
        pipeline.scheduler = shifted(pipeline.scheduler, setup.flow_shift)
    if setup.boundary_ratio is not None:
        if "boundary_ratio" not in pipeline.config or getattr(pipeline, "transformer_2", None) is None:
            raise InputError(
                f"--boundary-ratio can't be honoured: this {type(pipeline).__name__} has one expert only; leave it out"
            )
        pipeline.register_to_config(boundary_ratio=setup.boundary_ratio)


def shifted(scheduler: Any, shift: float) -> Any:
    """A scheduler like this one with another shift.

    Raises:
        InputError: it has none.
    """
    config = scheduler.config
    name = next((name for name in _SHIFTS if name in config), None)
    cls = type(scheduler).__name__
    if name is None or (name == "flow_shift" and not config.get("use_flow_sigmas")):
        raise InputError(f"--flow-shift can't be honoured: {cls} has no shift; leave it out")
    if config.get("use_dynamic_shifting"):
        raise InputError(f"--flow-shift can't be honoured: {cls} chooses its shift by the picture's size; leave it out")
    return type(scheduler).from_config(config, **{name: shift})
