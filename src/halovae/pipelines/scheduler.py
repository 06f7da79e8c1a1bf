"""The scheduler's shift, the number of its steps, and the point where a second expert takes over."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

from halovae.base.errors import InputError
from halovae.base.files import first_line
from halovae.base.quiet import all_quiet
from halovae.pipelines.generation_settings import Generation, Setup, default, parameters

_SHIFTS = ("flow_shift", "shift")
_KNOWN = {"num_inference_steps", "device", "timesteps", "sigmas", "mu"}
"""What most schedulers' `set_timesteps` take. One that takes more may depend on what its pipeline gives it."""


def prepare_scheduler(pipeline: Any, setup: Setup) -> None:
    """Set what `setup` asks for."""
    if setup.flow_shift is not None:
        pipeline.scheduler = shifted(pipeline.scheduler, setup.flow_shift)
    if setup.boundary_ratio is not None:
        check_boundary(type(pipeline), pipeline.components, setup)
        pipeline.register_to_config(boundary_ratio=setup.boundary_ratio)


def check_boundary(cls: Any, components: Mapping[str, Any], setup: Setup) -> None:
    """Refuse a boundary between two experts where there is one."""
    takes_one = "boundary_ratio" in inspect.signature(cls.__init__).parameters
    if setup.boundary_ratio is not None and not (takes_one and components.get("transformer_2") is not None):
        raise InputError(f"--boundary-ratio can't be honoured: this {cls.__name__} has one expert only; leave it out")


def shifted(scheduler: Any, shift: float) -> Any:
    """A scheduler like this one with another shift. It has to have one."""
    config = scheduler.config
    name = next((name for name in _SHIFTS if name in config), None)
    cls = type(scheduler).__name__
    if name is None or (name == "flow_shift" and not config.get("use_flow_sigmas")):
        raise InputError(f"--flow-shift can't be honoured: {cls} has no shift; leave it out")
    if config.get("use_dynamic_shifting"):
        raise InputError(f"--flow-shift can't be honoured: {cls} chooses its shift by the picture's size; leave it out")
    return type(scheduler).from_config(config, **{name: shift})


def check_steps(cls: Any, scheduler: Any, generation: Generation) -> None:
    """Refuse a number of denoising steps that the scheduler can't take, before any work is done for it.

    The scheduler has its shift already, and is not changed.
    """
    known = parameters(cls)
    steps = generation.num_inference_steps or default(known, "num_inference_steps")
    if steps is None or not _takes(scheduler) <= _KNOWN:
        return
    scheduler = deepcopy(scheduler)
    refusal = _refusal(scheduler, steps)
    if refusal is None:
        _check_strength(cls, scheduler, steps, generation.strength)
        return
    top = scheduler.config.get("num_train_timesteps", 0)
    others = (*range(min(steps - 1, top), 0, -1), *range(steps + 1, top + 1))
    nearest = next((count for count in others if _refusal(scheduler, count) is None), None)
    remedy = "choose another number" if nearest is None else f"use {nearest}"
    if any((scheduler.config.get(name) or 1) > 1 for name in _SHIFTS):
        remedy += ", or a lower --flow-shift"
    raise InputError(f"--num-inference-steps {steps}: {type(scheduler).__name__} can't take it, {refusal}; {remedy}")


def _check_strength(cls: Any, scheduler: Any, steps: int, strength: float | None) -> None:
    """Refuse a share of the steps that is none; the pipeline's own code says which are left."""
    known = parameters(cls)
    if strength is None and "strength" in known:
        strength = known["strength"].default
    if not isinstance(strength, float) or not hasattr(cls, "get_timesteps"):
        return
    try:
        left = cls.get_timesteps(SimpleNamespace(scheduler=scheduler), steps, strength, "cpu")[0]
    except (AttributeError, TypeError):  # It wants more than its scheduler: then it is not known before the run.
        return
    if len(left) == 0:
        raise InputError(
            f"--strength {strength} of --num-inference-steps {steps} leaves no step to denoise: use more of either"
        )


def _refusal(scheduler: Any, steps: int) -> str | None:
    """Why a scheduler can't take so many steps, None if it can; asked of itself."""
    # Any shift will do where the picture's size gives it: counts don't depend on it.
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") and "mu" in _takes(scheduler) else {}
    try:
        with all_quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of numbers that are none, which are found below.
            scheduler.set_timesteps(steps, **shift)
    except Exception as error:  # Each scheduler has its own way to fail.
        return first_line(error)
    if not hasattr(scheduler, "index_for_timestep"):
        return None
    # Schedulers find the place to begin by the first noise level's number, and run over the end if that is not unique.
    try:
        unique = scheduler.index_for_timestep(scheduler.timesteps[0]) == 0
    except IndexError:
        return "its noise levels would not be numbers"
    return None if unique else "its first two noise levels would be the same"


def _takes(scheduler: Any) -> set[str]:
    return set(inspect.signature(scheduler.set_timesteps).parameters)
