"""The commands: each checks what its flags ask for together, and starts what does it. Libraries are imported there,
since they take seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from halovae.app import launch
from halovae.app.job import job_of
from halovae.app.run_options import RunOptions, VaeJob, check_other
from halovae.app.watch import guarded
from halovae.base.errors import Faults, InputError, counted
from halovae.base.files import write_json
from halovae.cli import flags

if TYPE_CHECKING:
    from halovae.app.session import Session
    from halovae.serve.server_settings import ServeOptions


def _run(words: Sequence[str], options: RunOptions, body: Callable[[Session], None]) -> int:
    """Run `body` on every rank; further ranks are started with the words of the command line. Returns the exit code."""
    here = launch.place()
    busy = options.vae_patch_parallel_size
    asked = busy or 1 if options.ranks is None else options.ranks
    ranks = asked if here is None else here.world_size
    if options.ranks not in (None, ranks):
        raise InputError(f"--ranks {options.ranks}: torchrun has started {ranks}; leave --ranks out")
    if here is None:
        launch.check_ranks(ranks)
    if busy is not None and busy > ranks:
        there = f"there {'is' if ranks == 1 else 'are'} only {counted(ranks, 'rank')}"
        raise InputError(f"--vae-patch-parallel-size {busy}: {there}; start more or ask for fewer")
    if isinstance(options.axis, tuple) and prod(options.axis) > (busy or ranks):
        needed, shape = prod(options.axis), "x".join(map(str, options.axis))
        raise InputError(f"--axis {shape} needs {needed} ranks, but there are {busy or ranks}: add --ranks")
    if here is None and sys.stderr.isatty():
        # Libraries take seconds to import. The first stage writes over it.
        sys.stderr.write(f"starting {counted(ranks, 'rank')}\r")
    if here is None and ranks > 1:
        return launch.run_ranks(words, ranks)
    with guarded():
        # Not before the signals are taken care of: importing torch and diffusers takes seconds.
        from halovae.app.session import session

        with session(options, here or launch.Place()) as opened:
            body(opened)
    return 0


# ---- whole pipelines, and a tiny one to try --------------------------------------------------------------------------


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

    return _run(words, job.options, on_rank)


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

    return _run(context.obj, job.options, on_rank)


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
        raise InputError(f"halovae serve needs {error.name}: in a checkout, pip install '.[serve]'") from error
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


# ---- a VAE alone -----------------------------------------------------------------------------------------------------


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
    return _run(context.obj, options, lambda session: _on_rank().encode(session, job))


@flags.takes("decode")
def decode(context: typer.Context, **given: Any) -> int:
    """Decode latents to a video or an image."""
    options, job = _asked(context, given)
    return _run(context.obj, options, lambda session: _on_rank().decode(session, job))


@flags.takes("roundtrip")
def roundtrip(context: typer.Context, **given: Any) -> int:
    """Encode a video or an image, decode it again, and write what came out; exit code 1 if --compare fails."""
    from halovae.media import check_still, inspect

    options, job = _asked(context, given)
    if inspect(job.source).is_image:
        check_still(job.output, 1)
    return _run(context.obj, options, lambda session: _on_rank().roundtrip(session, job))


@flags.takes("warm-up")
def warm_up(context: typer.Context, *, height: int, width: int, num_frames: int, **how: Any) -> int:
    """Encode and decode noise once, so that what is found out and compiled in first calls is on disk afterwards."""
    from halovae.media.reader import check_size

    check_size(height, width)
    sizes = num_frames, height, width
    return _run(context.obj, RunOptions(**how), lambda session: _on_rank().warm_up(session, sizes))


_TO_END_RAY = 8.0
"""Seconds that its processes get to end in."""


@flags.takes("encode-dataset")
def encode_dataset(
    context: typer.Context, *, dry_run: bool, json: Path | None, report: Path | None, **given: Any
) -> int:  # fmt: skip
    """Encode a dataset of videos and images to latents, once each, however often it is interrupted."""
    if not given["bucket"] and not given["bucket_area"]:
        raise InputError("--bucket is missing: give one or more, such as --bucket 480x832x81, or --bucket-area")
    with guarded("the same command goes on from there", _TO_END_RAY):
        try:
            import ray.data as _data  # pyright: ignore[reportUnusedImport]
        except ModuleNotFoundError as error:
            raise InputError(
                f"halovae encode-dataset needs {error.name}: in a checkout, pip install '.[dataset]'"
            ) from error
        del _data
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


# ---- a look at what others have made, or would make ------------------------------------------------------------------


@flags.takes("compare")
def compare(context: typer.Context, **given: Any) -> int:
    """Compare two videos, two images or two latents files; exit code 1 if a gate fails."""
    with guarded():
        from halovae.app import compare_files

        gates = compare_files.compare(compare_files.CompareJob(words=tuple(context.obj), **given))
    failed = [gate for gate in gates if not gate.passed]
    for gate in failed:
        sys.stderr.write(f"halovae: gate failed: {gate}\n")
    return 1 if failed else 0


@flags.takes("plan")
def plan(
    context: typer.Context, *, height: int, width: int, num_frames: int, ranks: tuple[int, ...], link: str,
    memory: float | None, flops: float | None, bandwidth: float | None, json: Path | None, **how: Any,
) -> int:  # fmt: skip
    """Predict time, waiting, messages and memory of encode and decode, for every mode and cut."""
    from halovae.media.reader import check_size

    check_size(height, width)
    if (flops is None) != (bandwidth is None):
        raise InputError("--flops and --bandwidth belong together: give both, or none to measure this device")
    rates = None if flops is None or bandwidth is None else (flops * 1e12, bandwidth * 1e9)

    def on_rank(session: Session) -> None:
        from halovae.app import plan

        sizes = num_frames, height, width
        plan.plan(session, plan.PlanJob(sizes=sizes, ranks=ranks, link=link, memory=memory, rates=rates, json=json))

    started = 2 if link == "measured" and launch.place() is None else None
    return _run(context.obj, RunOptions(ranks=started, **how), on_rank)


@flags.takes("doctor")
def doctor(context: typer.Context, *, ranks: int | None, device: str | None, clear_cache: bool) -> int:
    """Print versions and devices, measure the link between ranks, and prove that they compute exactly."""
    here = launch.place()
    if here is None and not clear_cache:
        ranks = 2 if ranks is None else ranks
        launch.check_ranks(ranks)
    from halovae.app import doctor as checks  # It takes seconds.

    if clear_cache:
        checks.clear_cache()
        return 0
    if here is None or (here.rank == 0 and not launch.was_launched()):
        typer.echo(checks.versions())
    if here is None:
        device = device or checks.fallback(ranks or 1)
        context.obj = ["doctor", f"--ranks={ranks}", *([] if device is None else [f"--device={device}"])]
    return _run(context.obj, RunOptions(ranks=ranks, device=device), checks.prove)
