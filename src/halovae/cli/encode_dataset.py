"""`halovae encode-dataset`: many clips to latents, on the devices of a machine or a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from halovae.app.run_options import check_written
from halovae.app.watch import guarded
from halovae.base.errors import InputError
from halovae.base.files import DEMO, check_model, write_json
from halovae.cli import flags


@flags.takes("encode-dataset")
def encode_dataset(
    context: typer.Context, *, dry_run: bool, json: Path | None, report: Path | None, **given: Any
) -> int:  # fmt: skip
    """Encode a dataset of videos and images to latents, once each, however often it is interrupted."""
    if given["model"] not in (None, DEMO):
        check_model(given["model"])
    if not given["bucket"] and not given["bucket_area"]:
        raise InputError("--bucket is missing: give one or more, such as --bucket 480x832x81, or --bucket-area")
    check_written(json, report)
    try:
        import ray.data as _data  # pyright: ignore[reportUnusedImport]  # Before signals are taken care of: it takes some.
    except ModuleNotFoundError as error:
        raise InputError(f"halovae encode-dataset needs {error.name}: pip install 'halovae[dataset]'") from error
    del _data
    with guarded("the same command goes on from there"):
        from halovae.datasets.progress import summary
        from halovae.datasets.run_dataset import Asked, DatasetRun

        words = {name: getattr(value, "value", value) for name, value in given.items()}
        run = DatasetRun(Asked(**words))
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
