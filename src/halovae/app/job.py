"""One run of a command that runs a whole pipeline: what it shall do, from the words of its flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halovae.app.run_options import RunOptions, chosen_mode, parse_axis
from halovae.base.errors import Faults
from halovae.pipelines.generation_settings import Generation, Setup

if TYPE_CHECKING:
    pass

_RENAMED = {
    "guidance_scale_high": "guidance_scale_2",
    "fps": "frame_rate",
    "vae_use_slicing": "vae_slicing",
    "vae_patch_parallel_size": "vae_size",
    "enable_layerwise_offload": "layerwise_offload",
    "enable_cpu_offload": "cpu_offload",
    "axis": "vae_axis",
}
"""Flags whose setting has another name."""


@dataclass(frozen=True, kw_only=True)
class PipelineJob:
    """What one run of a command shall do."""

    task: str
    model: str
    output: Path
    generation: Generation
    """Without the images, which every rank reads for itself."""
    setup: Setup
    options: RunOptions
    """What else a rank needs to know."""
    image: Path | None = None
    last_image: Path | None = None
    fps: int = 1
    crf: int | None = None
    """Of the mp4, None: halovae's own."""
    lossless: bool = False
    """Whether the mp4 keeps every pixel."""
    dry_run: bool = False
    json: Path | None = None
    report: Path | None = None
    words: tuple[str, ...] = ()
    """The command line."""
    notes: tuple[str, ...] = ()
    """What of the flags a user might not expect."""


def job_of(task: str, given: Mapping[str, Any], words: tuple[str, ...] = ()) -> PipelineJob:
    """What a command's arguments, by name, ask for; `words` as the user typed them."""
    values, faults = {_RENAMED.get(name, name): value for name, value in given.items()}, Faults()
    values |= {"vae_axis": "auto", "vae_mode": None}
    with faults.noted():
        values["vae_axis"] = parse_axis(given["axis"])
    with faults.noted():
        values["vae_mode"] = chosen_mode("--vae-mode", given["vae_mode"], given["vae_use_tiling"])
    for name in ("dtype", "vae_dtype", "vae_encode_dtype", "vae_decode_dtype"):
        values[name] = None if given.get(name) is None else given[name].value
    values["dtype"] = values["dtype"] or Setup.dtype  # until the device is known
    names = {field.name for field in fields(Generation)} - {"image", "last_image"}
    generation, setup = Generation(), Setup()
    with faults.noted():
        generation = Generation(**{name: values[name] for name in names & set(values)})
    with faults.noted():
        setup = Setup(**{field.name: values[field.name] for field in fields(Setup) if field.name in values})
    if given.get("lossless") and given.get("crf") is not None:
        faults.add(f"--lossless loses nothing, so --crf {given['crf']} has no meaning: leave one of them out")
    faults.check()
    own = {field.name for field in fields(PipelineJob)} & set(given)
    return PipelineJob(
        **{name: given[name] for name in own},
        task=task,
        generation=generation,
        setup=setup,
        options=RunOptions(
            axis=setup.vae_axis, **{name: given[name] for name in ("model", "ranks", "dtype", "device")}
        ),
        words=words,
        notes=("--vae-use-tiling: the VAE runs in its own tiles (--vae-mode tile)",) * given["vae_use_tiling"],
    )
