"""One run of a command that runs a whole pipeline: what it shall do, from the words of its flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from halovae.app.run_options import RunOptions, check_tiling
from halovae.base.errors import Faults
from halovae.pipelines.generation_settings import Generation, Setup, flag


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
    faults, vae_mode = Faults(), "tile" if given["vae_use_tiling"] else given["vae_mode"]
    with faults.noted():
        check_tiling("--vae-mode", given["vae_mode"], given["vae_use_tiling"])
    generation, setup = Generation(), Setup()
    with faults.noted():
        generation = Generation(**_settings(Generation, {**given, "image": None, "last_image": None}))
    with faults.noted():
        # Its dtype stands until the device is known.
        setup = Setup(**_settings(Setup, {**given, "vae_mode": vae_mode, "dtype": given["dtype"] or Setup.dtype}))
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


def _settings(kind: type[Generation] | type[Setup], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a class among a command's arguments."""
    names = {field.name: flag(field.name).removeprefix("--").replace("-", "_") for field in fields(kind)}
    return {setting: given[name] for setting, name in names.items() if name in given}
