"""A pipeline without weights: its parts built from their configs on the meta device."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from halovae.base.errors import InputError
from halovae.base.files import first_line
from halovae.base.quiet import all_quiet
from halovae.pipelines.load import PipelineSource


def outline(source: PipelineSource, with_encoders: bool = True) -> dict[str, Any]:
    """The parts of a pipeline by name, as far as configs tell them: networks without weights, and the scheduler.

    Tokenizers and other parts that are no networks are left out.

    Args:
        source: where the pipeline is.
        with_encoders: whether the parts that come from transformers, which encode text and images, are in it.

    Raises:
        InputError: a config is missing or can't be used.
    """
    parts: dict[str, Any] = {}
    for name, entry in source.index.items():
        if not isinstance(entry, list) or len(entry) != 2:
            continue
        library, class_name = entry
        if library == "transformers" and not with_encoders:
            continue
        cls: Any = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), str(class_name), None)
        try:
            with all_quiet():
                part = _built(source.location, name, cls)
        except Exception as error:  # The hub, the file system, and the constructors of whatever class it is.
            raise InputError(f"can't build {name} of {source.model} from its config: {first_line(error)}") from error
        if part is not None:
            parts[name] = part
    return parts


def _built(location: str, name: str, cls: Any) -> Any:
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        kind: Any = cls.config_class
        config = kind.from_pretrained(location, subfolder=name)
        with torch.device("meta"):
            return cls(config)
    if not hasattr(cls, "from_config") or not hasattr(cls, "load_config"):
        return None
    config = cls.load_config(location, subfolder=name)
    device = "meta" if nn.Module in cls.__mro__ else "cpu"
    with torch.device(device):
        return cls.from_config(config)
