"""`halovae encode`, `decode`, `roundtrip`, `warm-up` and `encode-dataset`: a VAE alone."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from halovae.app.run_options import RunOptions, VaeJob, check_other
from halovae.app.run_ranks import run
from halovae.app.watch import guarded
from halovae.base.errors import InputError
from halovae.base.files import write_json
from halovae.cli import flags


def _asked(context: typer.Context, given: dict[str, Any]) -> tuple[RunOptions, VaeJob]:
    """What a command's arguments, by name, ask for."""
    own = {field.name: given.pop(field.name) for field in fields(VaeJob) if field.name in given}
    options, job = RunOptions(**given), VaeJob(**own, words=tuple(context.obj))
    check_other(job.output, job.source)
    return options, job


def _on_rank() -> Any:
    """What a rank does. Imported there: it takes seconds."""
    from halovae.app import vae_runs

    return vae_runs


@flags.takes("encode")
def encode(context: typer.Context, **given: Any) -> int:
    """Encode a video or an image to latents, with all that `halovae decode` needs."""
    from halovae.media import inspect

    options, job = _asked(context, given)
    inspect(job.source)
    return run(context.obj, options, lambda session: _on_rank().encode(session, job))


@flags.takes("decode")
def decode(context: typer.Context, **given: Any) -> int:
    """Decode latents to a video or an image."""
    options, job = _asked(context, given)
    return run(context.obj, options, lambda session: _on_rank().decode(session, job))


@flags.takes("roundtrip")
def roundtrip(context: typer.Context, **given: Any) -> int:
    """Encode a video or an image, decode it again, and write what came out; exit code 1 if --compare fails."""
    from halovae.media import check_still, inspect

    options, job = _asked(context, given)
    if inspect(job.source).is_image:
        check_still(job.output, 1)
    return run(context.obj, options, lambda session: _on_rank().roundtrip(session, job))


@flags.takes("warm-up")
def warm_up(context: typer.Context, *, height: int, width: int, num_frames: int, **how: Any) -> int:
    """Encode and decode noise once, so that what is found out and compiled in first calls is on disk afterwards."""
    from halovae.media.reader import check_size

    check_size(height, width)
    sizes = num_frames, height, width
    return run(context.obj, RunOptions(**how), lambda session: _on_rank().warm_up(session, sizes))


@flags.takes("encode-dataset")
def encode_dataset(
    context: typer.Context, *, dry_run: bool, json: Path | None, report: Path | None, **given: Any
) -> int:  # fmt: skip
    """Encode a dataset of videos and images to latents, once each, however often it is interrupted."""
    if not given["bucket"] and not given["bucket_area"]:
        raise InputError("--bucket is missing: give one or more, such as --bucket 480x832x81, or --bucket-area")
    try:
        import ray.data as _data  # pyright: ignore[reportUnusedImport]  # Before signals are taken care of: it takes some.
    except ModuleNotFoundError as error:
        raise InputError(f"halovae encode-dataset needs {error.name}: pip install 'halovae[dataset]'") from error
    del _data
    with guarded("the same command goes on from there"):
        from halovae.datasets.progress import summary
        from halovae.datasets.run_dataset import Asked, DatasetRun

        run = DatasetRun(Asked(**given))
        with run.started():
            if dry_run:
                typer.echo(run.plan())
                return 0
            done = run.encode()
        typer.echo(summary(done, run.asked.output))
        if json is not None:
            write_json(json, {**run.folder.document(), "counts": done.to_dict()})
        if report is not None:
            from halovae.datasets.contact_sheet import page
            from halovae.evaluation.report import write_report

            typer.echo(f"report: {write_report(report, page(run, done, context.obj))}")
    return 0
