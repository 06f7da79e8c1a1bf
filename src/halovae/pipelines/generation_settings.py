"""What a caller may choose: how a pipeline is spread over ranks, and what one call of it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        """Check the choices against the number of ranks.

        Raises:
            InputError: more ranks are asked for than there are, or the degrees don't divide them.
        """
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


FLAGS = {"guidance_scale_2": "--guidance-scale-high", "frame_rate": "--fps"}
"""Flags that are not named as their setting."""


def flag(name: str) -> str:
    """The command line's name of a setting, for messages."""
    return FLAGS.get(name, "--" + name.replace("_", "-"))
