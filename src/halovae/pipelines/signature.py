"""What a pipeline can do, read from its call's signature: no pipeline is known by name."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from halovae.base.errors import Faults
from halovae.pipelines.generation_settings import Generation, flag


def parameters(cls: Any) -> dict[str, inspect.Parameter]:
    """Parameters of a call of a pipeline of this class, without `self`."""
    found = dict(inspect.signature(cls.__call__).parameters)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: one for name, one in found.items() if name != "self" and one.kind in named}


def does(cls: Any, task: str) -> bool:
    """Whether a class of pipelines can do a task: "image-to-video", "text-to-video" or "image-to-image"."""
    known = parameters(cls)
    takes_image, makes_video = "image" in known, "num_frames" in known
    settings = {field.name for field in fields(Generation)}
    if any(_is_required(known[name]) and name not in settings for name in known):
        return False
    if task == "text-to-video":
        return makes_video and "prompt" in known and not (takes_image and _is_required(known["image"]))
    return takes_image and makes_video == (task == "image-to-video")


def arguments(cls: Any, generation: Generation) -> dict[str, Any]:
    """The keyword arguments of a call of a pipeline of this class for what is set in `generation`.

    Raises:
        InputError: a setting that this pipeline can't honour, or one that it needs and that is missing.
    """
    known, name = parameters(cls), cls.__name__
    chosen: dict[str, Any] = {}
    faults = Faults()
    for field in fields(generation):
        value = getattr(generation, field.name)
        if value is None or field.name == "seed" or (field.name == "frame_rate" and field.name not in known):
            continue
        if field.name not in known:
            faults.add(f"{flag(field.name)} can't be honoured: {name} takes no {field.name}; leave it out")
        chosen[field.name] = value
    if "max_area" in known and generation.height and generation.width:
        # Some pipelines scale every size to one number of pixels, if not told otherwise.
        chosen["max_area"] = generation.height * generation.width
    for wanted in ("image", "prompt"):
        if wanted in known and wanted not in chosen and _is_needed(known, wanted):
            faults.add(f"{flag(wanted)} is missing: {name} needs one")
    faults.check()
    return chosen


def default(known: dict[str, inspect.Parameter], name: str) -> int | None:
    """The whole number that a call takes if `name` is not set; None where there is none."""
    value = known[name].default if name in known else None
    return value if isinstance(value, int) else None


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def _is_needed(known: dict[str, inspect.Parameter], name: str) -> bool:
    """A prompt has a default of None where embeddings may stand for it, and is needed all the same."""
    return _is_required(known[name]) or (name == "prompt" and "prompt_embeds" in known)
