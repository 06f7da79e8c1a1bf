"""What a run of a pipeline took: the table that is printed, and the same for `--json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from halovae.app.clip_files import loss, lossy_words
from halovae.app.pages import command, memory_words
from halovae.app.tables import Row, mebibytes, table
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
    what = f"{count} frame{'s' * (count != 1)} of {width}x{height}"
    what += "" if job.task == "image-to-image" else f", {job.fps} per second"
    return "".join(
        f"{line}\n"
        for line in (
            f"{job.output}: {what}, seed {made.result.seed}",
            f"first frame after {made.result.first_seconds:.2f} s",
            f"{made.source.model} ({made.source.cls.__name__}), {made.setup.dtype}, {_where(session)}",
            *_vae_lines(made),
        )
    ) + table(stage_rows(made.document)) + _memory_line(made.document)  # fmt: skip


def page(session: Session, job: PipelineJob, made: PipelineRun, frames: NDArray[np.uint8]) -> Report:
    """For `--report`: what was made, where the time went, and what each rank did."""
    lost = loss(job.output, job.crf, job.lossless)
    found, lanes_seconds = made.document["seconds"], lanes(made.spans)
    seconds = {name: found[name] for name in (LOAD, *STAGES, WRITE) if name in found}
    facts = {
        "Pipeline": f"{made.source.model} ({made.source.cls.__name__}), {made.setup.dtype}, {_where(session)}",
        "Result": f"{len(frames)} frame{'s' * (len(frames) != 1)} of {frames.shape[2]}x{frames.shape[1]}",
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
        title=f"{job.output.name}: {job.task} on {session.group.size} rank{'s' * (session.group.size != 1)}",
        verdict=f"{sum(seconds.values()):.1f} s in all, {in_vae:.1f} s of them in the VAE.",
        facts=facts,
        costs=[(name.replace("vae", "VAE"), *values) for name, *values in stage_rows(made.document)],
        costs_text=f"{memory_words(session.device)} The probe is what only the first call of a kind does.",
        pictures=[section],
        seconds=lanes_seconds[0],
        lanes=lanes_seconds[1],
        command=command(job.words),
    )


def stage_rows(found: dict[str, Any]) -> list[Row]:
    """Seconds, shares and the largest peak memory of all ranks, stage by stage, from a run's document."""
    seconds = {name: found["seconds"][name] for name in (LOAD, *STAGES, WRITE) if name in found["seconds"]}
    total = sum(seconds.values())
    rows: list[Row] = [("stage", "seconds", "share", "peak memory")]
    for name, value in seconds.items():
        rows.append((name, f"{value:.2f}", f"{100 * value / total:.0f} %", _largest(found, name)))
    peaks = _peaks(found)
    rows.append(("total", f"{total:.2f}", "", mebibytes(max(peaks)) if peaks else ""))
    return rows


def _largest(found: dict[str, Any], stage: str) -> str:
    values = [rank["peak_memory"][stage] for rank in found["per_rank"] if stage in rank["peak_memory"]]
    return mebibytes(max(values)) if values else ""


def _peaks(found: dict[str, Any]) -> list[int]:
    """Bytes of each rank where it is known."""
    return [max(rank["peak_memory"].values()) for rank in found["per_rank"] if rank["peak_memory"]]


def _memory_line(found: dict[str, Any]) -> str:
    peaks = _peaks(found)
    if not peaks:
        return ""
    return "peak memory of each rank: " + ", ".join(f"{peak / 2**20:.0f}" for peak in peaks) + " MiB\n"


def _where(session: Session) -> str:
    ranks, device = session.group.size, session.device.type
    threads = f", {session.threads} thread{'s' * (session.threads != 1)} each" if device == "cpu" else ""
    return f"{ranks} rank{'s' * (ranks != 1)} on {device}{threads}"


def _vae_lines(made: PipelineRun) -> list[str]:
    """One line for each kind of parallel call of the VAE."""
    return list(dict.fromkeys(f"VAE {report}" for _, report in made.result.calls))
