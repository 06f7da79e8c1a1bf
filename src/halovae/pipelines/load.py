"""Find and load a whole pipeline, with its weights or without: a folder or a model of the hub, in diffusers' format."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from halovae.base.errors import InputError
from halovae.base.files import first_line
from halovae.base.options import Half
from halovae.base.private_diffusers import needed_parts, optional_parts, siblings
from halovae.base.quiet import all_quiet
from halovae.calls.dtypes import HalfDtypes
from halovae.media.models import read_config
from halovae.pipelines.generation_settings import Setup, does

_INDEX = "model_index.json"
_TABLES = {
    "image-to-video": "AUTO_IMAGE2VIDEO_PIPELINES_MAPPING",
    "text-to-video": "AUTO_TEXT2VIDEO_PIPELINES_MAPPING",
    "image-to-image": "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
}
"""Where diffusers lists, for each task, the pipelines that one set of weights can be loaded into."""


@dataclass(frozen=True, kw_only=True)
class PipelineSource:
    """Where a pipeline is, and what is in it, found without loading any weights."""

    model: str
    """As the user named it."""
    location: str
    """What `from_pretrained` gets."""
    cls: Any
    """The class of diffusers that it is loaded into."""
    index: Mapping[str, Any]
    """The content of model_index.json."""
    stated: bool = True
    """Whether model_index.json names this class; if not, it is another of the same family."""
    notes: tuple[str, ...] = ()
    """What a user might not expect of the choice."""


def find_pipeline(model: str, task: str) -> PipelineSource:
    """Find the pipeline of `model` that does `task`.

    Args:
        model: the folder of a pipeline, or a hub id such as "Wan-AI/Wan2.2-I2V-A14B-Diffusers".
        task: one of `TASKS`.

    Raises:
        InputError: there is no such model, it is no pipeline, it has no VAE, or can't do the task.
    """
    folder = Path(model).expanduser()
    location = str(folder.resolve()) if folder.is_dir() else model
    index = read_config(location, _INDEX)
    if index is None:
        raise InputError(f"--model {model} has no {_INDEX}: it is no whole diffusers pipeline")
    name = str(index.get("_class_name"))
    with all_quiet():
        stated: Any = getattr(diffusers, name, None) if re.fullmatch(r"\w+", name) else None
    if not isinstance(stated, type) or not issubclass(stated, DiffusionPipeline):
        raise InputError(f"--model {model} is a {name}, which is no pipeline of diffusers {diffusers.__version__}")
    if not isinstance(index.get("vae"), list) or index["vae"][1] is None:
        raise InputError(f"--model {model} is a {name} without a VAE")
    with all_quiet():
        cls = stated if does(stated, task) else _counterpart(stated, task, index)
    if cls is None:
        raise InputError(f"--model {model} is a {name}, which can't do {task}: {_lacks(stated, task)}")
    notes = () if cls is stated else (f"{model} says {name}: loaded as {cls.__name__} for {task}",)
    return PipelineSource(model=model, location=location, cls=cls, index=index, stated=cls is stated, notes=notes)


def load_pipeline(source: PipelineSource, setup: Setup) -> Any:
    """Load all parts of the pipeline, on the CPU.

    Raises:
        InputError: a part is missing or damaged.
    """
    halves = torch_dtypes(setup)
    vae_dtype = torch.promote_types(halves["encode"], halves["decode"])
    try:
        with all_quiet():
            pipeline = source.cls.from_pretrained(
                source.location, torch_dtype={"default": getattr(torch, setup.dtype), "vae": vae_dtype}
            )
    except Exception as error:  # diffusers, transformers, the hub and safetensors each have their own families.
        raise InputError(f"can't load {source.model}: {first_line(error)}") from error
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    if len(set(halves.values())) > 1:
        HalfDtypes(pipeline.vae, halves).cast()
    return pipeline


def torch_dtypes(setup: Setup) -> dict[Half, torch.dtype]:
    """The number format of each half of the VAE."""
    return {half: getattr(torch, name) for half, name in setup.vae_dtypes.items()}


def _counterpart(stated: Any, task: str, index: Mapping[str, Any]) -> Any:
    """Another pipeline of the same family that does `task` with the parts that are there, or None."""
    tables = vars(importlib.import_module("diffusers.pipelines.auto_pipeline"))
    families = {
        family
        for name, table in tables.items()
        if name.startswith("AUTO_") and isinstance(table, Mapping)
        for family, cls in table.items()
        if cls is stated
    }
    listed = tables.get(_TABLES[task], {})
    for family in sorted(families & set(listed)):
        if does(listed[family], task):
            return listed[family]
    if task == "image-to-image":
        return None  # Siblings that take an image often take a mask or a control picture with it.
    package = importlib.import_module(stated.__module__.rpartition(".")[0])
    relatives = [getattr(package, name) for name in siblings(package) if name.endswith("Pipeline")]
    fitting = [cls for cls in relatives if isinstance(cls, type) and does(cls, task)]
    # All parts that are not optional are those of the model.
    given = {name for name in index if not name.startswith("_")}
    fitting = [cls for cls in fitting if needed_parts(cls) - optional_parts(cls) <= given]
    return fitting[0] if len(fitting) == 1 else None


def _lacks(cls: Any, task: str) -> str:
    if task == "text-to-video":
        return "it makes no video from text alone"
    return "it takes no image" if not does(cls, "image-to-image") and not does(cls, "image-to-video") else (
        "it makes no video" if task == "image-to-video" else "it makes videos"
    )  # fmt: skip


def outline(source: PipelineSource, with_encoders: bool = True) -> dict[str, Any]:
    """The parts of a pipeline by name, as far as configs tell them: networks without weights, and the scheduler.

    Tokenizers and other parts that are no networks are left out; on request also what comes from transformers, which
    encodes text and images.
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
