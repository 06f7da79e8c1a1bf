"""`halovae encode`, `decode`, `roundtrip` and `warm-up` on one rank: a VAE alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import typer

from halovae.api.parallelize import parallelize
from halovae.app import clip_files, comparison, pages, tables
from halovae.app.run_options import VaeJob
from halovae.app.session import Half, Loaded, Session
from halovae.base.errors import HalovaeError
from halovae.base.files import write_json
from halovae.evaluation.report import write_report
from halovae.evaluation.scores import Frame, SquaredErrors
from halovae.media import Frames, check_still, codec, latents_file


def encode(session: Session, job: VaeJob) -> None:
    film = clip_files.open_clip(session, job.source, job.frames, job.height, job.width)
    loaded = session.load()
    fit = session.fit(loaded, (film.count, *film.size))
    with latents_file.LatentsWriter(job.output, loaded.limits.time_dim) as writer:
        take = writer.put if session.is_first else lambda piece: None
        with session.parallel(loaded.vae, gather="first") as handle:
            half = clip_files.encode(session, loaded, fit, film, handle, take)
        document = tables.document(session, loaded, fit, {"encode": half})
        if not session.is_first:
            return
        writer.finish(clip_files.latents_info(loaded.source.model, loaded.vae, film, fit))
    shape = "x".join(map(str, writer.shape))
    line = f"latents {shape} of {tables.clip_line(fit, film.pace.fps)}"
    _tell(session, loaded, job, line, document, "encode", half)


def _tell(
    session: Session, loaded: Loaded, job: VaeJob, line: str, document: dict[str, Any], name: str, half: Half
) -> None:  # fmt: skip
    """What is said at the end of one half alone."""
    if job.json is not None:
        write_json(job.json, document | {"input": str(job.source), "output": str(job.output)})
    typer.echo(f"{job.output}: {line}")
    typer.echo(tables.described(session, loaded, half))
    typer.echo(tables.seconds_table({name: half}), nl=False)


def decode(session: Session, job: VaeJob) -> None:
    encoded, info = session.together("read", lambda advance: latents_file.load(job.source))
    check_still(job.output, info.frames)
    if session.options.model is None:
        session.options = replace(session.options, model=info.model)
    loaded = session.load()
    latents_file.check_shape(encoded, info, loaded.limits, loaded.source.class_name)
    written = clip_files.writing(session, job.output, info.fps, times=info.times, lossless=job.lossless)
    with session.parallel(loaded.vae, gather="first") as handle, written as take:
        half = clip_files.decode(session, loaded, info, encoded, handle, lambda frames: take(codec.frames_of(frames)))
    document = tables.document(session, loaded, info, {"decode": half})
    if not session.is_first:
        return
    if loaded.source.class_name != info.model_class:
        session.stages.note(f"the latents were made by {info.model} ({info.model_class})")
    _tell(session, loaded, job, tables.clip_line(info, info.fps), document, "decode", half)


def roundtrip(session: Session, job: VaeJob) -> None:
    film = clip_files.open_clip(session, job.source, job.frames, job.height, job.width)
    check_still(job.output, film.count)
    loaded = session.load()
    fit = session.fit(loaded, (film.count, *film.size))
    errors, pace = SquaredErrors(), film.pace

    def compared(frames: Frames) -> Iterator[Frame]:
        for frame, source in zip(frames, film, strict=False):
            errors.add(source, frame)
            yield frame

    written = clip_files.writing(
        session, job.output, pace.fps, through=compared, times=pace.times, lossless=job.lossless
    )
    parallel, keep = session.parallel(loaded.vae, gather=comparison.GATHER), job.compare or job.report is not None
    with parallel as handle, pages.recorded(session) as timeline, written as take:
        result = comparison.run_through(session, loaded, fit, film, handle, keep=keep, take=take)
    in_tiles = job.compare and "tile" in (result.encode.mode, result.decode.mode)
    exact = comparison.run_exact(session, loaded, fit, film) if in_tiles else None
    document = tables.document(session, loaded, fit, result.halves)
    spans = session.group.all_gather_object(timeline.spans)
    if not session.is_first:
        return
    result.peak_memory, result.psnr = tables.peak_of(document), errors.psnr
    lost = clip_files.loss(job.output, lossless=job.lossless)
    # On one rank while the others have ended: nobody needs them any more.
    if in_tiles:
        rest = comparison.run_rest(session, loaded, fit, film, result, exact)
        told, alone = comparison.told_of_tiles(session, rest, lost), rest.whole
    else:
        alone = comparison.run_through(session, loaded, fit, film, None, " on one rank") if job.compare else None
        told = comparison.told(session, result, alone, lost)
    document |= told.numbers | {"input": str(job.source), "output": str(job.output)}
    typer.echo(f"{job.output}: {tables.clip_line(fit, pace.fps)}")
    typer.echo(f"{tables.described(session, loaded, result.encode)}\n{told.text}", nl=False)
    if job.json is not None:
        write_json(job.json, document)
    if job.report is not None:
        page = pages.roundtrip_report(
            session, loaded, fit, handle, result, alone, told, spans, job.output.name, lost, job.words
        )
        typer.echo(f"report: {write_report(job.report, page)}")
    if told.passed is False:
        raise HalovaeError(told.verdict)


def warm_up(session: Session, sizes: tuple[int, int, int]) -> None:
    loaded = session.load()
    fit = session.fit(loaded, sizes)
    # One call of each half is enough, also of a VAE that takes frames one by one.
    frames = 1 if loaded.limits.per_frame else fit.padded_frames
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(3, frames, fit.padded_height, fit.padded_width, generator=generator) * 2 - 1
    clip = clip.to(session.device, session.dtype)
    with parallelize(loaded.vae, axis=session.options.axis, gather=comparison.GATHER) as handle, torch.no_grad():
        for half in ("encode", "decode"):
            started = time.perf_counter()
            with session.stages.stage(half):
                clip = getattr(codec, half)(loaded.vae, loaded.limits, clip)
                session.synchronize()
            if session.is_first and handle.last is not None:
                probe = handle.last.phases.get("probe", 0.0)
                typer.echo(f"{half}  {time.perf_counter() - started:.1f} s, {probe:.1f} s of them to set up")
    if session.is_first:
        typer.echo(f"kept: {tables.kept_verdicts()}")
