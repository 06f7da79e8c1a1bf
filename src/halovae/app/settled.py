"""What a run of a pipeline will make, checked and settled without any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from halovae import media
from halovae.base.errors import Faults
from halovae.media.vae_limits import Limits, limits_of
from halovae.pipelines.generation_settings import Generation, arguments
from halovae.pipelines.grid_sizes import TokenGrid, check_sizes, fill_in, grid_of
from halovae.pipelines.load import PipelineSource
from halovae.pipelines.scheduler import check_boundary, check_steps, shifted
from halovae.pipelines.transformers import check_backend, check_degrees

if TYPE_CHECKING:
    from halovae.app.job import PipelineJob


def planned(
    source: PipelineSource, components: Mapping[str, Any], job: PipelineJob
) -> tuple[Limits, TokenGrid, Generation]:
    """Check all that configs can tell of a run.

    Returns what the VAE takes, how pixels become tokens, and the job's settings as by `settled`.
    """
    limits, faults, generation = limits_of(components["vae"]), Faults(), job.generation
    grid = grid_of(components, limits)
    with faults.noted():
        check_degrees(components, job.setup)
    with faults.noted():
        check_backend(components, job.setup)
    with faults.noted():
        check_boundary(source.cls, components, job.setup)
    with faults.noted():
        generation = settled(source.cls, components, grid, job)
    scheduler, shift = components.get("scheduler"), job.setup.flow_shift
    if scheduler is not None:  # It may be of a class that only the pipeline knows.
        with faults.noted():
            check_steps(source.cls, scheduler if shift is None else shifted(scheduler, shift), generation)
    faults.check()
    return limits, grid, generation


def settled(cls: Any, components: Mapping[str, Any], grid: TokenGrid, job: PipelineJob) -> Generation:
    """The job's settings with its images, and with sizes that this pipeline takes."""
    faults, paths = Faults(), {"image": job.image, "last_image": job.last_image}
    whole = job.generation
    for name, path in paths.items():
        if path is not None:
            # That there is one counts, also where it can't be read: one fault is told once.
            whole = replace(whole, **{name: path})
            with faults.noted():
                whole = replace(whole, **{name: _read(path, None, None)})
    size = (whole.image.height, whole.image.width) if isinstance(whole.image, Image.Image) else None
    # Without the image's proportions, only the sizes that were asked for can be judged.
    sized = whole if isinstance(whole.image, Path) else fill_in(cls, grid, whole, size)
    with faults.noted():
        check_sizes(cls, grid, sized, job.setup)
    with faults.noted():
        arguments(cls, sized)
    if sized.guidance_scale_2 is not None and components.get("transformer_2") is None:
        faults.add(f"--guidance-scale-high can't be honoured: {cls.__name__} has one expert here; leave it out")
    faults.check()
    fitted = {name: _read(path, sized.height, sized.width) for name, path in paths.items() if path is not None}
    return replace(sized, **fitted)


def _read(path: Path, height: int | None, width: int | None) -> Image.Image:
    return Image.fromarray(media.read(path, height=height, width=width).frames[0])
