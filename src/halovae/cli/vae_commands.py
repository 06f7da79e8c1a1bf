"""`halovae encode`, `decode`, `roundtrip` and `warm-up`: a VAE alone, on ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from halovae.app.run_options import RunOptions, check_files, run_options
from halovae.base.errors import HalovaeError
from halovae.cli import flags

if TYPE_CHECKING:
    from collections.abc import Iterator

    from halovae.app.session import Half, Loaded, Session
    from halovae.evaluation.scores import Frame
    from halovae.media import Film, FrameRange, Frames
    from halovae.media.latents_file import LatentsInfo
    from halovae.media.vae_limits import Fit


@dataclass(frozen=True, kw_only=True)
class _Job:
    source: Path
    output: Path
    json: Path | None
    frames: FrameRange | None = None
    height: int | None = None
    width: int | None = None
    compare: bool = False
    lossless: bool = False
    report: Path | None = None
    words: tuple[str, ...] = ()


def _asked(context: typer.Context, given: dict[str, Any], suffixes: tuple[str, ...]) -> tuple[RunOptions, _Job]:
    """What a command's arguments, by name, ask for; its output may end with `suffixes`."""
    from halovae.media import FrameRange

    own = {field.name: given.pop(field.name) for field in fields(_Job) if field.name in given}
    options = run_options(**given)
    if own.get("frames") is not None:
        own["frames"] = FrameRange.parse(own["frames"])
    job = _Job(**own, words=tuple(context.obj))
    check_files(job.source, job.output, suffixes, job.json, job.report)
    return options, job


@flags.takes("encode")
def encode(context: typer.Context, **given: Any) -> int:
    """Encode a video or an image to latents, with all that `halovae decode` needs."""
    from halovae.app.run_ranks import run
    from halovae.media import inspect

    options, job = _asked(context, given, (".safetensors",))
    inspect(job.source)
    return run(context, options, lambda session: _encode(session, job))


def _encode(session: Session, job: _Job) -> None:
    from halovae.app import clip_files, tables
    from halovae.media import latents_file

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
        writer.finish(_info(loaded, film, fit))
    shape = "x".join(map(str, writer.shape))
    line = f"latents {shape} of {tables.clip_line(fit, film.pace.fps)}"
    _tell(session, loaded, job, line, document, "encode", half)


def _info(loaded: Loaded, film: Film, fit: Fit) -> LatentsInfo:
    from halovae.media.latents_file import LatentsInfo, scaling_of

    return LatentsInfo(
        model=loaded.source.model,
        model_class=loaded.source.class_name,
        scaling=scaling_of(loaded.vae.config),
        fps=film.pace.fps,
        times=film.pace.times,
        **vars(fit),
    )


def _tell(
    session: Session, loaded: Loaded, job: _Job, line: str, document: dict[str, Any], name: str, half: Half
) -> None:  # fmt: skip
    """What is said at the end of one half alone."""
    from halovae.app import tables
    from halovae.base.files import write_json

    if job.json is not None:
        write_json(job.json, document | {"input": str(job.source), "output": str(job.output)})
    typer.echo(f"{job.output}: {line}")
    typer.echo(tables.described(session, loaded, half))
    typer.echo(tables.seconds_table({name: half}), nl=False)


@flags.takes("decode")
def decode(context: typer.Context, **given: Any) -> int:
    """Decode latents to a video or an image."""
    from halovae.app.run_ranks import run
    from halovae.media import SUFFIXES

    options, job = _asked(context, given, SUFFIXES)
    return run(context, options, lambda session: _decode(session, job))


def _decode(session: Session, job: _Job) -> None:
    from halovae.app import clip_files, tables
    from halovae.media import check_still, codec, latents_file
    from halovae.media.vae_limits import Fit

    encoded, info = session.together("read", lambda advance: latents_file.load(job.source))
    check_still(job.output, info.frames)
    if session.options.model is None:
        session.options = replace(session.options, model=info.model)
    loaded = session.load()
    latents_file.check_shape(encoded, info, loaded.limits, loaded.source.class_name)
    fit = Fit(**{name: getattr(info, name) for name in Fit.__dataclass_fields__})
    written = clip_files.writing(session, job.output, info.fps, times=info.times, lossless=job.lossless)
    with session.parallel(loaded.vae, gather="first") as handle, written as take:
        half = clip_files.decode(session, loaded, fit, encoded, handle, lambda frames: take(codec.Frames(frames)))
    document = tables.document(session, loaded, fit, {"decode": half})
    if not session.is_first:
        return
    if loaded.source.class_name != info.model_class:
        session.stages.note(f"the latents were made by {info.model} ({info.model_class})")
    _tell(session, loaded, job, tables.clip_line(fit, info.fps), document, "decode", half)


@flags.takes("roundtrip")
def roundtrip(context: typer.Context, **given: Any) -> int:
    """Encode a video or an image, decode it again, and write what came out; exit code 1 if --compare fails."""
    from halovae.app.run_ranks import run
    from halovae.media import SUFFIXES, check_still, inspect

    options, job = _asked(context, given, SUFFIXES)
    if inspect(job.source).is_image:
        check_still(job.output, 1)
    return run(context, options, lambda session: _roundtrip(session, job))


def _roundtrip(session: Session, job: _Job) -> None:
    from halovae.app import comparison as compare
    from halovae.app import pages, tile_comparison
    from halovae.app import tables as report
    from halovae.app.clip_files import loss, open_clip, writing
    from halovae.base.files import write_json
    from halovae.evaluation.report import write_report
    from halovae.evaluation.scores import SquaredErrors
    from halovae.media import check_still

    film = open_clip(session, job.source, job.frames, job.height, job.width)
    check_still(job.output, film.count)
    loaded = session.load()
    fit = session.fit(loaded, (film.count, *film.size))
    errors, pace = SquaredErrors(), film.pace

    def compared(frames: Frames) -> Iterator[Frame]:
        for frame, source in zip(frames, film, strict=False):
            errors.add(source, frame)
            yield frame

    written = writing(session, job.output, pace.fps, through=compared, times=pace.times, lossless=job.lossless)
    parallel, keep = session.parallel(loaded.vae, gather=compare.GATHER), job.compare or job.report is not None
    with parallel as handle, pages.recorded(session) as timeline, written as take:
        result = compare.run_through(session, loaded, fit, film, handle, keep=keep, take=take)
    in_tiles = job.compare and "tile" in (result.encode.mode, result.decode.mode)
    exact = tile_comparison.run_exact(session, loaded, fit, film) if in_tiles else None
    document = report.document(session, loaded, fit, result.halves)
    spans = session.group.all_gather_object(timeline.spans)
    if not session.is_first:
        return
    peak, lost = report.peak_of(document), loss(job.output, lossless=job.lossless)
    # On one rank while the others have ended: nobody needs them any more.
    if in_tiles:
        rest = tile_comparison.run_rest(session, loaded, fit, film, result, exact)
        told, alone = tile_comparison.told(session, rest, peak, lost), rest.whole
    else:
        alone = compare.run_through(session, loaded, fit, film, None, " on one rank") if job.compare else None
        told = compare.told(session, errors.psnr, result, alone, peak, lost)
    document |= told.numbers | {"input": str(job.source), "output": str(job.output)}
    typer.echo(f"{job.output}: {report.clip_line(fit, pace.fps)}")
    typer.echo(f"{report.described(session, loaded, result.encode)}\n{told.text}", nl=False)
    if job.json is not None:
        write_json(job.json, document)
    if job.report is not None:
        run = pages.Run(
            name=job.source.name, output=job.output.name, lost=lost, film=film, result=result, alone=alone, told=told,
            handle=handle, spans=spans, words=job.words,
        )  # fmt: skip
        page = pages.roundtrip_report(session, loaded, fit, run)
        typer.echo(f"report: {write_report(job.report, page)}")
    if told.passed is False:
        raise HalovaeError(told.verdict)


@flags.takes("warm-up")
def warm_up(context: typer.Context, *, height: int, width: int, num_frames: int, **how: Any) -> int:
    """Encode and decode noise once, so that what is found out and compiled in first calls is on disk afterwards."""
    from halovae.app.run_ranks import run
    from halovae.media.reader import check_size

    check_size(height, width)
    return run(context, run_options(**how), lambda session: _warm_up(session, (num_frames, height, width)))


def _warm_up(session: Session, sizes: tuple[int, int, int]) -> None:
    import torch

    from halovae.api.parallelize import parallelize
    from halovae.app.comparison import GATHER
    from halovae.cli.doctor import kept_verdicts
    from halovae.media import codec

    loaded = session.load()
    fit = session.fit(loaded, sizes)
    # One call of each half is enough, also of a VAE that takes frames one by one.
    frames = 1 if loaded.limits.per_frame else fit.padded_frames
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(3, frames, fit.padded_height, fit.padded_width, generator=generator) * 2 - 1
    clip = clip.to(session.device, session.dtype)
    with parallelize(loaded.vae, axis=session.options.axis, gather=GATHER) as handle, torch.no_grad():
        for half in ("encode", "decode"):
            started = time.perf_counter()
            with session.stages.stage(half):
                clip = getattr(codec, half)(loaded.vae, loaded.limits, clip)
                session.synchronize()
            if session.is_first and handle.last is not None:
                probe = handle.last.phases.get("probe", 0.0)
                typer.echo(f"{half}  {time.perf_counter() - started:.1f} s, {probe:.1f} s of them to find out")
    if session.is_first:
        typer.echo(f"kept: {kept_verdicts()}")
