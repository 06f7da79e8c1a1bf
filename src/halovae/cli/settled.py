"""What a run of a pipeline will make, checked and settled without any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from halovae import media
from halovae.errors import InputError
from halovae.pipelines.load import PipelineSource
from halovae.pipelines.scheduler import check_boundary, check_steps, shifted
from halovae.pipelines.settings import Generation
from halovae.pipelines.signature import arguments
from halovae.pipelines.sizes import Grid, check_sizes, fill_in, grid_of
from halovae.pipelines.transformers import check_backend, check_degrees

if TYPE_CHECKING:
    from halovae.cli.generation import Job


def planned(source: PipelineSource, components: Mapping[str, Any], job: Job) -> tuple[Grid, Generation]:
    """Check all that configs can tell of a run.

    Args:
        source: where the pipeline is.
        components: of the pipeline; weights are not needed.
        job: what was asked for.

    Returns:
        How pixels become tokens, and the job's settings as by `settled`.

    Raises:
        InputError: what the run itself would refuse too.
    """
    check_degrees(components, job.setup)
    check_backend(components, job.setup)
    check_boundary(source.cls, components, job.setup)
    grid = grid_of(components)
    generation = settled(source.cls, components, grid, job)
    scheduler, shift = components.get("scheduler"), job.setup.flow_shift
    if scheduler is not None:  # It may be of a class that only the pipeline knows.
        check_steps(source.cls, scheduler if shift is None else shifted(scheduler, shift), generation)
    return grid, generation


def settled(cls: Any, components: Mapping[str, Any], grid: Grid, job: Job) -> Generation:
    """The job's settings with its images, and with sizes that this pipeline takes.

    Args:
        cls: of the pipeline.
        components: of the pipeline; their weights are not touched.
        grid: of the pipeline.
        job: what was asked for.

    Raises:
        InputError: a setting that can't be honoured, or a size that doesn't fit.
    """
    size = None
    if job.image is not None:
        first = _read(job.image, None, None)
        size = first.height, first.width
    generation = fill_in(cls, grid, job.generation, size)
    height, width = generation.height, generation.width
    check_sizes(cls, grid, generation, job.setup)
    generation = replace(
        generation,
        image=None if job.image is None else _read(job.image, height, width),
        last_image=None if job.last_image is None else _read(job.last_image, height, width),
    )
    arguments(cls, generation)
    if generation.guidance_scale_2 is not None and components.get("transformer_2") is None:
        raise InputError(f"--guidance-scale-high can't be honoured: {cls.__name__} has one expert here; leave it out")
    return generation


def _read(path: Path, height: int | None, width: int | None) -> Image.Image:
    return Image.fromarray(media.read(path, height=height, width=width).frames[0])
