"""What a caller may choose: how a pipeline is spread over ranks, and what one call of it makes.

What a pipeline can do is read from its call's signature: no pipeline is known by name.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from halovae.base.errors import Faults
from halovae.base.options import Axis, Half, Mode

if TYPE_CHECKING:
    from PIL import Image

TASKS = ("image-to-video", "text-to-video", "image-to-image")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a pipeline is loaded and spread over the ranks. One for all its calls."""

    dtype: str = "bfloat16"
    """Of all parts but the VAE."""
    vae_dtype: str | None = None
    """Of the VAE; None: as `dtype`."""
    vae_encode_dtype: str | None = None
    """Of the VAE's encode; None: as `vae_dtype`."""
    vae_decode_dtype: str | None = None
    """Of the VAE's decode; None: as `vae_dtype`."""
    vae_mode: Mode | None = None
    """As `mode` of `halovae.parallelize`."""
    vae_untiled: bool = False
    """As `untiled` of `halovae.parallelize`."""
    vae_encode: bool = True
    """Whether encode runs on all ranks; if not, every rank encodes the whole for itself."""
    vae_decode: bool = True
    """Whether decode runs on all ranks; if not, every rank decodes the whole for itself."""
    vae_size: int | None = None
    """Use the first so many ranks for the VAE; None: all."""
    vae_axis: Axis = "auto"
    """As `axis` of `halovae.parallelize`."""
    vae_slicing: bool = False
    """Let the VAE take a batch one by one."""
    ulysses_degree: int = 1
    """Ranks that share a sequence by exchanging attention heads."""
    ring_degree: int = 1
    """Ranks that share a sequence by passing keys and values around."""
    layerwise_offload: bool = False
    """Keep weights on the host, and bring each layer to the device when it is due."""
    cpu_offload: bool = False
    """Keep weights on the host, and bring each part to the device when it is due."""
    attention_backend: str | None = None
    """Of the transformers, by diffusers' name; None: diffusers' default."""
    compile: bool = False
    """Compile the transformers' blocks."""
    flow_shift: float | None = None
    """Of the scheduler; None: as the model says."""
    boundary_ratio: float | None = None
    """Share of the noise levels that the second expert begins at; None: as the model says."""

    def __post_init__(self) -> None:
        faults = Faults()
        for name in ("ulysses_degree", "ring_degree"):
            if getattr(self, name) < 1:
                faults.add(f"{flag(name)} {getattr(self, name)}: give 1 or more")
        if self.layerwise_offload and self.cpu_offload:
            faults.add("--enable-layerwise-offload and --enable-cpu-offload exclude each other: choose one")
        if self.vae_mode == "tile" and self.vae_axis != "auto":
            faults.add("--axis can't be honoured with --vae-mode tile, which cuts no axis: leave one of them out")
        if self.vae_untiled and self.vae_mode not in (None, "exact"):
            faults.add(f"--vae-untiled is for exact mode, but --vae-mode is {self.vae_mode}: leave one of them out")
        if self.boundary_ratio is not None and not 0 <= self.boundary_ratio <= 1:
            faults.add(f"--boundary-ratio {self.boundary_ratio}: give a number from 0 to 1")
        if self.flow_shift is not None and not self.flow_shift > 0:
            faults.add(f"--flow-shift {self.flow_shift}: give a number above 0")
        faults.check()

    @property
    def vae_dtypes(self) -> dict[Half, str]:
        """Of each half of the VAE."""
        own = self.vae_dtype or self.dtype
        return {"encode": self.vae_encode_dtype or own, "decode": self.vae_decode_dtype or own}

    def check_ranks(self, ranks: int) -> None:
        """Refuse choices that this number of ranks can't honour."""
        degree = self.ulysses_degree * self.ring_degree
        asked = f"--ulysses-degree {self.ulysses_degree}"
        if self.ring_degree > 1:
            asked += f" x --ring-degree {self.ring_degree}"
        faults = Faults()
        if degree > ranks:
            faults.add(f"{asked} needs {degree} ranks, but there are {ranks}: use --ranks {degree}")
        elif ranks % degree:
            faults.add(f"{asked} does not divide {ranks} ranks: choose degrees whose product does")
        if self.vae_size is not None and not 1 <= self.vae_size <= ranks:
            faults.add(f"--vae-patch-parallel-size {self.vae_size}: give 1 to {ranks}, the number of ranks")
        faults.check()


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one call of a pipeline makes. What is None is left to the pipeline's own default."""

    prompt: str | None = None
    negative_prompt: str | None = None
    image: Image.Image | None = None
    """The first frame, or the picture to edit."""
    last_image: Image.Image | None = None
    """The last frame."""
    height: int | None = None
    """In pixels."""
    width: int | None = None
    """In pixels."""
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    """Of the second expert, where a pipeline has two transformers."""
    true_cfg_scale: float | None = None
    strength: float | None = None
    """How much of the picture may change, 0 to 1."""
    frame_rate: float | None = None
    """Frames per second, for pipelines that want to know."""
    seed: int | None = None
    """None: drawn by the first rank, and the same on all."""

    def __post_init__(self) -> None:
        faults = Faults()
        for name in ("height", "width", "num_frames", "num_inference_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.add(f"{flag(name)} {value}: give 1 or more")
        faults.check()


FLAGS = {
    "guidance_scale_2": "--guidance-scale-high",
    "frame_rate": "--fps",
    "vae_slicing": "--vae-use-slicing",
    "vae_size": "--vae-patch-parallel-size",
    "vae_axis": "--axis",
    "layerwise_offload": "--enable-layerwise-offload",
    "cpu_offload": "--enable-cpu-offload",
}
"""Flags that are not named as their setting."""


def flag(name: str) -> str:
    """The command line's name of a setting, for messages."""
    return FLAGS.get(name, "--" + name.replace("_", "-"))


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
        # A prompt has a default of None where embeddings may stand for it, and is needed all the same.
        has_embeddings = wanted == "prompt" and "prompt_embeds" in known
        if wanted in known and wanted not in chosen and (_is_required(known[wanted]) or has_embeddings):
            faults.add(f"{flag(wanted)} is missing: {name} needs one")
    faults.check()
    return chosen


def default(known: dict[str, inspect.Parameter], name: str) -> int | None:
    """The whole number that a call takes if `name` is not set; None where there is none."""
    value = known[name].default if name in known else None
    return value if isinstance(value, int) else None


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty
