"""What the commands that run a whole pipeline share: from flags to files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from halovae.app import launch
from halovae.base.errors import Faults, HalovaeError, InputError
from halovae.base.files import check_model, check_output, first_line
from halovae.cli.flags import RunOptions, parse_axis
from halovae.pipelines.generation_settings import Generation, Setup

if TYPE_CHECKING:
    from halovae.app.session import Session
    from halovae.base.timeline import Span
    from halovae.pipelines.load import PipelineSource
    from halovae.pipelines.runner import Result, Runner

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
class Job:
    """What one run of a command shall do."""

    task: str
    model: str
    output: Path
    image: Path | None
    last_image: Path | None
    generation: Generation
    """Without the images, which every rank reads for itself."""
    setup: Setup
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


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a run made on this rank, for whoever writes or shows it."""

    source: PipelineSource
    generation: Generation
    """With the sizes that were chosen."""
    setup: Setup
    result: Result
    spans: list[list[Span]]
    """The timeline of every rank."""
    document: dict[str, Any]
    """What `--json` writes. On every rank."""


def start(context: typer.Context, task: str, given: Mapping[str, Any]) -> int:
    """Check a command's flags, and run it.

    Args:
        context: of the command.
        task: one of `pipelines.settings.TASKS`.
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

        return dry_run(job, ranks, given["dtype"], given["device"])
    options = RunOptions(
        model=job.model, ranks=given["ranks"], axis=job.setup.vae_axis, dtype=given["dtype"], device=given["device"]
    )
    return run(context, options, lambda session: _on_rank(session, job))


def job_of(task: str, given: Mapping[str, Any], words: tuple[str, ...] = ()) -> Job:
    """What a command's arguments, by name, ask for; `words` as the user typed them."""
    values, faults = {_RENAMED.get(name, name): value for name, value in given.items()}, Faults()
    values |= {"vae_axis": "auto", "vae_mode": None}
    with faults.noted():
        values["vae_axis"] = parse_axis(given["axis"])
    with faults.noted():
        values["vae_mode"] = _vae_mode(given)
    for name in ("dtype", "vae_dtype"):
        values[name] = None if given[name] is None else given[name].value
    values["dtype"] = values["dtype"] or Setup.dtype  # until the device is known
    names = {field.name for field in fields(Generation)} - {"image", "last_image"}
    generation, setup = Generation(), Setup()
    with faults.noted():
        generation = Generation(**{name: values[name] for name in names & set(values)})
    with faults.noted():
        setup = Setup(**{field.name: values[field.name] for field in fields(Setup) if field.name in values})
    faults.check()
    return Job(
        task=task,
        model=given["model"],
        output=given["output"],
        image=given.get("image"),
        last_image=given.get("last_image"),
        generation=generation,
        setup=setup,
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


def _check_files(task: str, given: Mapping[str, Any], faults: Faults) -> None:
    """Note files that can't be read or written, before anything is loaded."""
    from halovae.media import SUFFIXES, check_still

    with faults.noted():
        if given.get("lossless") and given.get("crf") is not None:
            crf = given["crf"]
            raise InputError(f"--lossless loses nothing, so --crf {crf} has no meaning: leave one of them out")
    with faults.noted():
        check_model(given["model"])
    output: Path = given["output"]
    with faults.noted():
        check_output(output, (".png",) if task == "image-to-image" else SUFFIXES)
        if given.get("num_frames") is not None:
            check_still(output, given["num_frames"])
    if given["json"] is not None:
        with faults.noted():
            check_output(given["json"], (".json",))
    if given["report"] is not None:
        from halovae.evaluation.report import check_report

        with faults.noted():
            check_report(given["report"])
    for name in ("image", "last_image"):
        if given.get(name) is not None:
            with faults.noted():
                _check_image(given[name], output)


def _check_image(path: Path, output: Path) -> None:
    from halovae.media import inspect

    if not inspect(path).is_image:
        raise InputError(f"{path} is a video: give a still image")
    if output.exists() and output.samefile(path):
        raise InputError(f"output {output} is the input: give another name")


def _on_rank(session: Session, job: Job) -> None:
    from halovae.app.clip_files import write_clip
    from halovae.app.generation_report import page, text
    from halovae.base.files import write_json
    from halovae.pipelines.stages import WRITE, Timeline

    made = make(session, job)
    if made.result.frames is None:
        return
    from fractions import Fraction

    writing = Timeline(session.device)
    with writing.stage(WRITE):
        write_clip(session, job.output, made.result.frames, Fraction(job.fps), job.crf, lossless=job.lossless)
    made.document["seconds"] |= writing.seconds
    if job.json is not None:
        write_json(job.json, made.document)
    typer.echo(text(session, job, made), nl=False)
    if job.report is not None:
        from halovae.evaluation.report import write_report

        typer.echo(f"report: {write_report(job.report, page(session, job, made))}")


def make(session: Session, job: Job) -> Made:
    """Load the pipeline, run it once, and account for it. Called on every rank."""
    from halovae.app.generation_report import document
    from halovae.app.pages import recorded
    from halovae.app.settled import planned
    from halovae.pipelines.outline import outline
    from halovae.pipelines.runner import Runner
    from halovae.pipelines.stages import LOAD, Timeline

    loading = Timeline(session.device)
    with loading.stage(LOAD):
        source = found(session, job)
        # Before weights are loaded, which takes minutes for a large model.
        _, generation = session.together(
            "check", lambda advance: planned(source, outline(source, with_encoders=False), job)
        )
        setup, pipeline = loaded(session, job, source)
        runner = session.together("spread", lambda advance: Runner(pipeline, setup, session.group, session.device))
    with runner, recorded(session) as timeline:
        try:
            result = _run(session, runner, generation)
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
    return Made(
        source=source,
        generation=generation,
        setup=setup,
        result=result,
        spans=session.group.all_gather_object(timeline.spans),
        document=document(session, job, source, generation, setup, result),
    )


def found(session: Session, job: Job) -> PipelineSource:
    """Where the pipeline of a job comes from; tells the user what they might not expect. Called on every rank."""
    from halovae.pipelines.load import find_pipeline

    source = session.together("find", lambda advance: find_pipeline(job.model, job.task))
    for note in (*job.notes, *source.notes):
        session.stages.note(note)
    return source


def loaded(session: Session, job: Job, source: PipelineSource) -> tuple[Setup, Any]:
    """The setup of a job with this rank's dtype, and the pipeline. Called on every rank."""
    from halovae.pipelines.load import load_pipeline

    setup = replace(job.setup, dtype=str(session.dtype).removeprefix("torch."))
    return setup, session.together("load", lambda advance: load_pipeline(source, setup))


def _run(session: Session, runner: Runner, generation: Generation) -> Result:
    with session.stages.stage("run", generation.num_inference_steps) as advance:

        def on_step(done: int, total: int | None) -> None:
            if done:
                advance()

        return runner.run(generation, on_step)
