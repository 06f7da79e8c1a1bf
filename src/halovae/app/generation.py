"""What the commands that run a whole pipeline share: from flags to files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from halovae.app import launch
from halovae.app.job import PipelineJob, PipelineRun, job_of
from halovae.app.run_options import check_other, check_written
from halovae.base.errors import Faults, HalovaeError, InputError
from halovae.base.files import check_model, check_output, first_line
from halovae.pipelines.generation_settings import Generation, Setup

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from halovae.app.session import Session
    from halovae.pipelines.load import PipelineSource
    from halovae.pipelines.runner import OnFrames, Result, Runner


def start(context: typer.Context, task: str, given: Mapping[str, Any]) -> int:
    """Check a command's flags, and run it.

    Args:
        context: of the command.
        task: one of `pipelines.TASKS`.
        given: the command's arguments by name.

    Returns:
        The exit code.
    """
    from halovae.app.run_ranks import run

    place, faults = launch.place(), Faults()
    ranks = place.world_size if place else given["ranks"] or 1
    job = None
    with faults.noted():
        job = job_of(task, given, tuple(context.obj))
        job.setup.check_ranks(ranks)
    _check_files(task, given, faults)
    faults.check()
    assert job is not None
    if job.dry_run:
        from halovae.app.dry_run import dry_run

        return dry_run(job, ranks)
    return run(context, job.options, lambda session: _on_rank(session, job))


def _check_files(task: str, given: Mapping[str, Any], faults: Faults) -> None:
    """Note files that can't be read or written, before anything is loaded."""
    from halovae.media import SUFFIXES, check_still
    from halovae.media.reader import check_size

    if given["height"] and given["width"]:
        with faults.noted():
            check_size(given["height"], given["width"])
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


def _on_rank(session: Session, job: PipelineJob) -> None:
    from fractions import Fraction

    import numpy as np

    from halovae.app.clip_files import writing
    from halovae.app.generation_report import page, text
    from halovae.base.files import write_json
    from halovae.pipelines.stages import WRITE, StageTimeline

    timeline, shown = StageTimeline(session.device), list["NDArray[np.uint8]"]()
    with ExitStack() as stack:
        take = stack.enter_context(writing(session, job.output, Fraction(job.fps), crf=job.crf, lossless=job.lossless))

        def on_frames(frames: NDArray[np.uint8]) -> None:
            take(frames)
            if job.report is not None:
                shown.append(frames)

        made = make(session, job, on_frames)
        with timeline.stage(WRITE):  # What of it is left.
            stack.close()
    if not session.is_first:
        return
    made.document["seconds"] |= timeline.seconds
    if job.json is not None:
        write_json(job.json, made.document)
    typer.echo(text(session, job, made), nl=False)
    if job.report is not None:
        from halovae.evaluation.report import write_report

        typer.echo(f"report: {write_report(job.report, page(session, job, made, np.concatenate(shown)))}")


def make(session: Session, job: PipelineJob, on_frames: OnFrames) -> PipelineRun:
    """Load the pipeline, run it once, and account for it. Called on every rank; the frames go to `on_frames`."""
    from halovae.app.generation_report import document
    from halovae.app.pages import recorded
    from halovae.app.settled import planned
    from halovae.pipelines.load import outline
    from halovae.pipelines.runner import Runner
    from halovae.pipelines.stages import LOAD, StageTimeline

    loading = StageTimeline(session.device)
    with loading.stage(LOAD):
        source = found(session, job)
        # Before weights are loaded, which takes minutes for a large model.
        *_, generation = session.together(
            "check", lambda advance: planned(source, outline(source, with_encoders=False), job)
        )
        setup, pipeline = loaded(session, job, source)
        runner = session.together("spread", lambda advance: Runner(pipeline, setup, session.group, session.device))
    with runner, recorded(session) as timeline:
        try:
            result = _run(session, runner, generation, on_frames)
        except RuntimeError as error:
            if isinstance(error, HalovaeError) or source.stated:
                raise
            # Weights of one task in the pipeline of another: they load, and then the shapes of tensors don't fit.
            raise InputError(
                f"--model {source.model} has no weights for {job.task}: {source.cls.__name__} fails with them "
                f"({first_line(error)})"
            ) from error
    result = replace(
        result,
        seconds={**loading.seconds, **result.seconds},
        peak_memory={**loading.peak_memory, **result.peak_memory},
    )
    return PipelineRun(
        source=source,
        generation=generation,
        setup=setup,
        result=result,
        spans=session.group.all_gather_object(timeline.spans),
        document=document(session, job, source, generation, setup, result),
    )


def found(session: Session, job: PipelineJob) -> PipelineSource:
    """Where the pipeline of a job comes from; tells the user what they might not expect. Called on every rank."""
    from halovae.pipelines.load import find_pipeline

    source = session.together("find", lambda advance: find_pipeline(job.model, job.task))
    for note in (*job.notes, *source.notes):
        session.stages.note(note)
    return source


def loaded(session: Session, job: PipelineJob, source: PipelineSource) -> tuple[Setup, Any]:
    """The setup of a job with this rank's dtype, and the pipeline. Called on every rank."""
    from halovae.pipelines.load import load_pipeline

    setup = replace(job.setup, dtype=str(session.dtype).removeprefix("torch."))
    return setup, session.together("load", lambda advance: load_pipeline(source, setup))


def _run(session: Session, runner: Runner, generation: Generation, on_frames: OnFrames) -> Result:
    from halovae.pipelines.generation_settings import default, parameters

    known = parameters(type(runner.pipeline))
    steps, count = (getattr(generation, name) or default(known, name) for name in ("num_inference_steps", "num_frames"))
    with ExitStack() as stack:
        advance = stack.enter_context(session.stages.stage("run", steps, "steps"))
        is_decoding = False

        def on_step(done: int, total: int | None) -> None:
            if done:
                advance()

        def counted(frames: NDArray[np.uint8]) -> None:
            nonlocal advance, is_decoding
            if not is_decoding:
                is_decoding = True
                stack.close()
                advance = stack.enter_context(session.stages.stage("decode", count, "frames"))
            on_frames(frames)
            advance(len(frames))

        return runner.run(generation, on_step, counted)
