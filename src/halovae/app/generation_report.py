"""What a run of a pipeline took: the table that is printed, and the same for `--json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from halovae.app.clip_files import loss, lossy_words
from halovae.app.pages import command, memory_words
from halovae.app.tables import Row, counted, mebibytes, place_of, table
from halovae.evaluation.report import PictureSection, Report, lanes
from halovae.pipelines.stages import LOAD, STAGES, WRITE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from halovae.app.job import PipelineJob, PipelineRun
    from halovae.app.session import Session
    from halovae.pipelines.generation_settings import Generation, Setup
    from halovae.pipelines.load import PipelineSource
    from halovae.pipelines.runner import Result


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
