"""A run of a whole pipeline on ranks: made, written while it is made, and accounted for."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from halovae.app.clip_files import loss, lossy_words, writing
from halovae.app.job import PipelineJob
from halovae.app.pages import command, memory_words, recorded
from halovae.app.session import Session
from halovae.app.settled import planned
from halovae.app.tables import Row, mebibytes, place_of, table
from halovae.base.errors import HalovaeError, InputError, counted
from halovae.base.files import first_line, write_json
from halovae.base.timeline import Span
from halovae.evaluation.report import PictureSection, Report, lanes, write_report
from halovae.pipelines.generation_settings import Generation, Setup, default, parameters
from halovae.pipelines.load import PipelineSource, find_pipeline, load_pipeline, outline
from halovae.pipelines.runner import OnFrames, Result, Runner
from halovae.pipelines.stages import LOAD, STAGES, WRITE, StageTimeline


@dataclass(frozen=True, kw_only=True)
class PipelineRun:
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


def generate(session: Session, job: PipelineJob) -> None:
    """Make what a job asks for, and tell, write and show what it took. Called on every rank."""
    timeline, shown = StageTimeline(session.device), list[NDArray[np.uint8]]()
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
        typer.echo(f"report: {write_report(job.report, page(session, job, made, np.concatenate(shown)))}")


def make(session: Session, job: PipelineJob, on_frames: OnFrames) -> PipelineRun:
    """Load the pipeline, run it once, and account for it. Called on every rank; the frames go to `on_frames`."""
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
    seconds, peaks = {**loading.seconds, **result.seconds}, {**loading.peak_memory, **result.peak_memory}
    result = replace(result, seconds=seconds, peak_memory=peaks)
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
    source = session.together("find", lambda advance: find_pipeline(job.model, job.task))
    for note in (*job.notes, *source.notes):
        session.stages.note(note)
    return source


def loaded(session: Session, job: PipelineJob, source: PipelineSource) -> tuple[Setup, Any]:
    """The setup of a job with this rank's dtype, and the pipeline. Called on every rank."""
    setup = replace(job.setup, dtype=str(session.dtype).removeprefix("torch."))
    return setup, session.together("load", lambda advance: load_pipeline(source, setup))


def _run(session: Session, runner: Runner, generation: Generation, on_frames: OnFrames) -> Result:
    known = parameters(type(runner.pipeline))
    steps, count = (getattr(generation, name) or default(known, name) for name in ("num_inference_steps", "num_frames"))
    with ExitStack() as stack:
        advance = stack.enter_context(session.stages.stage("run", steps, "steps"))
        is_decoding = False

        def on_step(done: int, total: int | None) -> None:
            if done:
                advance()

        def decoded(frames: NDArray[np.uint8]) -> None:
            nonlocal advance, is_decoding
            if not is_decoding:
                is_decoding = True
                stack.close()
                advance = stack.enter_context(session.stages.stage("decode", count, "frames"))
            on_frames(frames)
            advance(len(frames))

        return runner.run(generation, on_step, decoded)


# ---- what is said of it ----------------------------------------------------------------------------------------------


def document(
    session: Session, job: PipelineJob, source: PipelineSource, generation: Generation, setup: Setup, result: Result
) -> dict[str, Any]:
    """All that is known of a run but the pictures. Called on every rank: each tells what it did."""
    own = {
        "seconds": result.seconds,
        "peak_memory": result.peak_memory,
        "vae_calls": [report.to_dict() for _, report in result.calls],
    }
    settings = {name: value for name, value in vars(generation).items() if name not in ("image", "last_image")}
    return {
        "task": job.task,
        "model": source.model,
        "pipeline": source.cls.__name__,
        "image": None if job.image is None else str(job.image),
        "last_image": None if job.last_image is None else str(job.last_image),
        "output": str(job.output),
        "fps": job.fps,
        "ranks": session.group.size,
        "device": session.device.type,
        "threads_per_rank": session.threads,
        "settings": settings | {"seed": result.seed},
        "setup": asdict(setup),
        "seconds": dict(result.seconds),
        "first_frame_seconds": result.first_seconds,
        "per_rank": session.group.all_gather_object(own),
    }


def text(session: Session, job: PipelineJob, made: PipelineRun) -> str:
    """What a user reads at the end."""
    count, height, width = made.result.sizes
    what = f"{counted(count, 'frame')} of {width}x{height}"
    what += "" if job.task == "image-to-image" else f", {job.fps} per second"
    return "".join(
        f"{line}\n"
        for line in (
            f"{job.output}: {what}, seed {made.result.seed}",
            f"first frame after {made.result.first_seconds:.2f} s",
            f"{made.source.model} ({made.source.cls.__name__}), {made.setup.dtype}, {place_of(session)}",
            *dict.fromkeys(f"VAE {report}" for _, report in made.result.calls),
        )
    ) + table(stage_rows(made.document)) + _memory_line(made.document)  # fmt: skip


def page(session: Session, job: PipelineJob, made: PipelineRun, frames: NDArray[np.uint8]) -> Report:
    """For `--report`: what was made, where the time went, and what each rank did."""
    lost = loss(job.output, job.crf, job.lossless)
    seconds, (timeline_seconds, found_lanes) = _seconds(made.document), lanes(made.spans)
    facts = {
        "Pipeline": f"{made.source.model} ({made.source.cls.__name__}), {made.setup.dtype}, {place_of(session)}",
        "Result": f"{counted(len(frames), 'frame')} of {frames.shape[2]}x{frames.shape[1]}",
        **({"Prompt": made.generation.prompt} if made.generation.prompt else {}),
        "Seed": str(made.result.seed),
        "File": f"{job.output.name}, {lossy_words(lost)}" if lost else f"{job.output.name}, which keeps every pixel",
    }
    in_vae = sum(value for name, value in seconds.items() if name.startswith("vae "))
    section = PictureSection(
        title="What was made",
        text=f"As it was computed, before {job.output.name} was written.",
        name=job.output.name,
        frames=frames,
    )
    return Report(
        title=f"{job.output.name}: {job.task} on {counted(session.group.size, 'rank')}",
        verdict=f"{sum(seconds.values()):.1f} s in all, {in_vae:.1f} s of them in the VAE.",
        facts=facts,
        costs=[(name.replace("vae", "VAE"), *values) for name, *values in stage_rows(made.document)],
        costs_text=f"{memory_words(session.device)} The probe is what only the first call of a kind does.",
        pictures=[section],
        seconds=timeline_seconds,
        lanes=found_lanes,
        command=command(job.words),
    )


def stage_rows(found: dict[str, Any]) -> list[Row]:
    """Seconds, shares and the largest peak memory of all ranks, stage by stage, from a run's document."""
    seconds, ranks = _seconds(found), [rank["peak_memory"] for rank in found["per_rank"]]
    total = sum(seconds.values())
    rows: list[Row] = [("stage", "seconds", "share", "peak memory")]
    for name, value in seconds.items():
        peak = _most(rank[name] for rank in ranks if name in rank)
        rows.append((name, f"{value:.2f}", f"{100 * value / total:.0f} %", peak))
    rows.append(("total", f"{total:.2f}", "", _most(max(rank.values()) for rank in ranks if rank)))
    return rows


def _seconds(found: dict[str, Any]) -> dict[str, float]:
    """Of the stages, in their order."""
    return {name: found["seconds"][name] for name in (LOAD, *STAGES, WRITE) if name in found["seconds"]}


def _most(peaks: Iterable[int]) -> str:
    """The largest, in words; nothing where the system can't tell."""
    largest = max(peaks, default=None)
    return "" if largest is None else mebibytes(largest)


def _memory_line(found: dict[str, Any]) -> str:
    peaks = [max(rank["peak_memory"].values()) for rank in found["per_rank"] if rank["peak_memory"]]
    if not peaks:
        return ""
    return "peak memory of each rank: " + ", ".join(f"{peak / 2**20:.0f}" for peak in peaks) + " MiB\n"
