"""`halovae image-to-video`, `text-to-video`, `image-to-image` and `serve`: whole pipelines, and a tiny one to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from halovae.app import launch
from halovae.app.job import job_of
from halovae.app.run_options import check_other
from halovae.app.run_ranks import run
from halovae.app.watch import guarded
from halovae.base.errors import Faults, InputError
from halovae.cli import flags

if TYPE_CHECKING:
    from halovae.app.session import Session
    from halovae.serve.server_settings import ServeOptions


@flags.takes("image-to-video", output=Path("i2v_output.mp4"))
def image_to_video(context: typer.Context, **given: Any) -> int:
    """Make a video from an image and a prompt, with any image-to-video pipeline of diffusers, on several devices."""
    return _start(context.obj, "image-to-video", given)


@flags.takes("text-to-video", output=Path("t2v_output.mp4"))
def text_to_video(context: typer.Context, **given: Any) -> int:
    """Make a video from a prompt, with any text-to-video pipeline of diffusers, on several devices."""
    return _start(context.obj, "text-to-video", given)


@flags.takes("image-to-image", output=Path("i2i_output.png"))
def image_to_image(context: typer.Context, **given: Any) -> int:
    """Edit an image after a prompt, with any image-to-image pipeline of diffusers, on several devices."""
    return _start(context.obj, "image-to-image", given)


def _start(words: Sequence[str], task: str, given: Mapping[str, Any]) -> int:
    """Check the arguments, by name, of the command for a task, and run it; returns the exit code."""
    place, faults, job = launch.place(), Faults(), None
    ranks = place.world_size if place else given["ranks"] or 1
    with faults.noted():
        job = job_of(task, given, tuple(words))
        job.setup.check_ranks(ranks)
    _check_files(given, faults)
    faults.check()
    assert job is not None
    if job.dry_run:
        from halovae.app.dry_run import dry_run

        return dry_run(job, ranks)

    def on_rank(session: Session) -> None:
        from halovae.app.generation import generate

        generate(session, job)

    return run(words, job.options, on_rank)


def _check_files(given: Mapping[str, Any], faults: Faults) -> None:
    """Note files that don't suit each other or the sizes, before anything is loaded."""
    from halovae.media import check_still
    from halovae.media.reader import check_size

    if given["height"] and given["width"]:
        with faults.noted():
            check_size(given["height"], given["width"])
    if given.get("num_frames") is not None:
        with faults.noted():
            check_still(given["output"], given["num_frames"])
    for name in ("image", "last_image"):
        if given.get(name) is not None:
            with faults.noted():
                _check_image(given[name], given["output"])


def _check_image(path: Path, output: Path) -> None:
    from halovae.media import inspect

    if not inspect(path).is_image:
        raise InputError(f"{path} is a video: give a still image")
    check_other(output, path)


@flags.takes("serve")
def serve(context: typer.Context, **given: Any) -> int:
    """Keep a pipeline loaded on several devices, and serve it over HTTP, as OpenAI's videos API and with a web page."""
    task = given.pop("task")
    job = job_of(task, {**given, "output": Path("video.mp4")})
    place = launch.place()
    if place is not None and not launch.was_launched():
        raise InputError(
            "halovae serve starts its ranks by itself: "
            f"run `halovae serve --ranks {place.local_world_size} ...` without torchrun, once on each machine"
        )
    ranks = place.world_size if place else given["ranks"] or 1
    job.setup.check_ranks(ranks)
    if place is None:
        launch.check_ranks(ranks)
        return _front(_options(task, given, ranks), context.obj)

    def on_rank(session: Session) -> None:
        from halovae.serve.worker import serve_ranks

        serve_ranks(session, job, given["max_steps"])

    return run(context.obj, job.options, on_rank)


def _options(task: str, given: Mapping[str, Any], ranks: int) -> ServeOptions:
    from halovae.serve.server_settings import ServeOptions, ServerLimits

    most = {name: given[f"max_{name}"] for name in ("pixels", "frames", "steps", "queue")}
    return ServeOptions(
        model=given["served_model_name"] or given["model"],
        task=task,
        ranks=ranks,
        limits=ServerLimits(upload_bytes=given["max_upload"] * 2**20, **most),
        **{name: given[name] for name in ("host", "port", "store", "keep", "key")},
    )


def _front(chosen: ServeOptions, arguments: list[str]) -> int:
    try:
        from halovae.serve.front import serve as run_front
    except ModuleNotFoundError as error:
        raise InputError(f"halovae serve needs {error.name}: pip install 'halovae[serve]'") from error
    return run_front(chosen, arguments)


_TRY = {
    "image-to-video": '--image PICTURE --prompt "" --height 128 --width 192 --num-frames 17 --num-inference-steps 4',
    "text-to-video": '--prompt "a cup" --height 128 --width 192 --num-frames 17 --num-inference-steps 8',
    "image-to-image": '--image PICTURE --prompt "" --strength 0.3 --height 256 --width 384 --num-inference-steps 8',
}


_SHOWS = {
    "image-to-video": "its videos are the image, standing still, whatever the seed",
    "text-to-video": "its videos are clouds of colour, others for each seed",
    "image-to-image": "its pictures are the image in coarse squares",
}


@flags.takes("make-demo-model")
def make_demo_model(context: typer.Context, *, folder: Path, kind: str) -> int:
    """Build a tiny pipeline in diffusers' format, without any download, to try the other commands."""
    with guarded():
        from halovae.base.quiet import all_quiet

        with all_quiet():  # Importing speaks too.
            from halovae.pipelines.demo import make_demo_model as make

            make(folder, kind)
    typer.echo(f"{folder}: {_SHOWS[kind]}; try it with")
    typer.echo(f"  halovae {kind} --model {folder} {_TRY[kind]} --ranks 2")
    return 0
