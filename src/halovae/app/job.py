"""One run of a command that runs a whole pipeline: what it shall do, from the words of its flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halovae.app import launch
from halovae.app.run_options import RunOptions, check_other, check_written, parse_axis
from halovae.base.errors import Faults, InputError
from halovae.base.files import check_model, check_output
from halovae.pipelines.generation_settings import Generation, Setup

if TYPE_CHECKING:
    from halovae.app.session import Session

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
    image: Path | None
    last_image: Path | None
    generation: Generation
    """Without the images, which every rank reads for itself."""
    setup: Setup
    options: RunOptions
    """What else a rank needs to know."""
    fps: int
    crf: int | None
    """Of the mp4, None: halovae's own."""
    lossless: bool
    """Whether the mp4 keeps every pixel."""
    dry_run: bool
    json: Path | None
    report: Path | None
    words: tuple[str, ...]
    """The command line."""
    notes: tuple[str, ...]
    """What of the flags a user might not expect."""


def job_of(task: str, given: Mapping[str, Any], words: tuple[str, ...] = ()) -> PipelineJob:
    """What a command's arguments, by name, ask for; `words` as the user typed them."""
    values, faults = {_RENAMED.get(name, name): value for name, value in given.items()}, Faults()
    values |= {"vae_axis": "auto", "vae_mode": None}
    with faults.noted():
        values["vae_axis"] = parse_axis(given["axis"])
    with faults.noted():
        values["vae_mode"] = _vae_mode(given)
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
    return PipelineJob(
        task=task,
        model=given["model"],
        output=given["output"],
        image=given.get("image"),
        last_image=given.get("last_image"),
        generation=generation,
        setup=setup,
        options=RunOptions(
            model=given["model"],
            ranks=given["ranks"],
            axis=setup.vae_axis,
            dtype=given["dtype"],
            device=given["device"],
        ),
        fps=given.get("fps", 1),
        crf=given.get("crf"),
        lossless=given.get("lossless", False),
        dry_run=given["dry_run"],
        json=given["json"],
        report=given["report"],
        words=words,
        notes=("--vae-use-tiling: the VAE runs in its own tiles (--vae-mode tile)",) * given["vae_use_tiling"],
    )


def _vae_mode(given: Mapping[str, Any]) -> str | None:
    asked = None if given["vae_mode"] is None else given["vae_mode"].value
    if given["vae_use_tiling"] and asked not in (None, "tile"):
        raise InputError(f"--vae-use-tiling means --vae-mode tile, but --vae-mode {asked} is given too: leave one out")
    return "tile" if given["vae_use_tiling"] else asked


def start(words: Sequence[str], task: str, given: Mapping[str, Any]) -> int:
    """Check the arguments, by name, of the command for a task, and run it; returns the exit code."""
    place, faults = launch.place(), Faults()
    ranks = place.world_size if place else given["ranks"] or 1
    job = None
    with faults.noted():
        job = job_of(task, given, tuple(words))
        job.setup.check_ranks(ranks)
    _check_files(task, given, faults)
    faults.check()
    assert job is not None
    if job.dry_run:
        from halovae.app.dry_run import dry_run

        return dry_run(job, ranks)

    def on_rank(session: Session) -> None:
        from halovae.app.generation import generate

        generate(session, job)

    return launch.run(words, job.options, on_rank)


def _check_files(task: str, given: Mapping[str, Any], faults: Faults) -> None:
    """Note files that can't be read or written, before anything is loaded."""
    from halovae.media import SUFFIXES, check_still

    with faults.noted():
        check_model(given["model"])
    output: Path = given["output"]
    with faults.noted():
        check_output(output, (".png",) if task == "image-to-image" else SUFFIXES)
        if given.get("num_frames") is not None:
            check_still(output, given["num_frames"])
    for written in ((given["json"], None), (None, given["report"])):
        with faults.noted():
            check_written(*written)
    for name in ("image", "last_image"):
        if given.get(name) is not None:
            with faults.noted():
                _check_image(given[name], output)


def _check_image(path: Path, output: Path) -> None:
    from halovae.media import inspect

    if not inspect(path).is_image:
        raise InputError(f"{path} is a video: give a still image")
    check_other(output, path)
