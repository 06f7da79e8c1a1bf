"""`halovae serve`: a pipeline behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from halovae.app import launch
from halovae.app.job import PipelineJob, job_of
from halovae.base.errors import InputError
from halovae.base.files import check_model
from halovae.cli import flags

if TYPE_CHECKING:
    from halovae.app.session import Session
    from halovae.serve.server_settings import ServeOptions


@flags.takes("serve")
def serve(context: typer.Context, **given: Any) -> int:
    """Keep a pipeline loaded on several devices, and serve it over HTTP, as OpenAI's videos API and with a web page."""
    job = job_of(given["task"], {**given, "output": Path("video.mp4"), "dry_run": False, "json": None, "report": None})
    place, ranks = launch.place(), given["ranks"]
    if place is not None and not launch.was_launched():
        raise InputError(
            "halovae serve starts its ranks by itself: "
            f"run `halovae serve --ranks {place.local_world_size} ...` without torchrun, once on each machine"
        )
    count = place.world_size if place else 1 if ranks is None else ranks
    if place is None:
        launch.check_ranks(count)
    job.setup.check_ranks(count)
    check_model(job.model)
    chosen = _options(given, count)
    if place is None:
        return _front(chosen, context.obj)
    from halovae.app.run_ranks import run

    return run(context, job.options, lambda session: _on_rank(session, job, given["max_steps"]))


def _options(given: dict[str, Any], ranks: int) -> ServeOptions:
    from halovae.serve.server_settings import ServeOptions, ServerLimits, parse_keep, read_key

    path = given["api_key_file"]
    return ServeOptions(
        model=given["served_model_name"] or given["model"],
        task=given["task"],
        ranks=ranks,
        host=given["host"],
        port=given["port"],
        store=given["store"],
        keep=parse_keep(given["keep"]),
        key=None if path is None else read_key(path),
        limits=ServerLimits(
            upload_bytes=given["max_upload"] * 2**20,
            pixels=given["max_pixels"],
            frames=given["max_frames"],
            steps=given["max_steps"],
            queue=given["max_queue"],
        ),
    )


def _front(chosen: ServeOptions, arguments: list[str]) -> int:
    try:
        from halovae.serve.front import serve as run_front
    except ModuleNotFoundError as error:
        raise InputError(f"halovae serve needs {error.name}: pip install 'halovae[serve]'") from error
    return run_front(chosen, arguments)


def _on_rank(session: Session, job: PipelineJob, steps: int) -> None:
    from halovae.serve.worker import serve_ranks

    serve_ranks(session, job, steps)
