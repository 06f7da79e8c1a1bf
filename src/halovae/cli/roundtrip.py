"""`halovae roundtrip`: a clip through encode and decode, to see what a VAE makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from halovae.app.run_options import run_options
from halovae.base.errors import HalovaeError
from halovae.cli import flags

if TYPE_CHECKING:
    from halovae.app.session import Session
    from halovae.media import FrameRange


@dataclass(frozen=True, kw_only=True)
class _Job:
    source: Path
    output: Path
    frames: FrameRange | None
    height: int | None
    width: int | None
    compare: bool
    lossless: bool
    json: Path | None
    report: Path | None
    words: tuple[str, ...]


@flags.takes("roundtrip")
def roundtrip(
    context: typer.Context, *, source: Path, output: Path, frames: str | None, height: int | None, width: int | None,
    compare: bool, lossless: bool, json: Path | None, report: Path | None, **how: Any,
) -> int:  # fmt: skip
    """Encode a video or an image, decode it again, and write what came out; exit code 1 if --compare fails."""
    from halovae.app.run_options import check_files
    from halovae.app.run_ranks import run
    from halovae.media import SUFFIXES, FrameRange, check_still, inspect

    options = run_options(**how)
    frame_range = None if frames is None else FrameRange.parse(frames)
    check_files(source, output, SUFFIXES, json, report)
    if inspect(source).is_image:
        check_still(output, 1)
    job = _Job(
        source=source, output=output, frames=frame_range, height=height, width=width, compare=compare,
        lossless=lossless, json=json, report=report, words=tuple(context.obj),
    )  # fmt: skip
    return run(context, options, lambda session: _on_rank(session, job))


def _on_rank(session: Session, job: _Job) -> None:
    from halovae.app import comparison as compare
    from halovae.app import pages, tile_comparison
    from halovae.app import tables as report
    from halovae.app.clip_files import loss, read_clip, write_clip
    from halovae.base.files import write_json
    from halovae.evaluation.report import write_report
    from halovae.media import check_still, codec

    clip = read_clip(session, job.source, job.frames, job.height, job.width)
    check_still(job.output, len(clip.frames))
    loaded = session.load()
    fit = session.fit(loaded, clip.frames.shape[:3])
    padded = fit.pad(codec.to_tensor(clip.frames, session.dtype, session.device))
    with session.parallel(loaded.vae, gather=compare.GATHER) as handle, pages.recorded(session) as timeline:
        result = compare.run_through(session, loaded, fit, padded, handle)
    in_tiles = job.compare and "tile" in (result.encode.mode, result.decode.mode)
    exact = tile_comparison.run_exact(session, loaded, fit, padded) if in_tiles else None
    document = report.document(session, loaded, fit, result.halves)
    spans = session.group.all_gather_object(timeline.spans)
    if not session.is_first:
        return
    write_clip(session, job.output, result.frames, clip.fps, times=clip.times, lossless=job.lossless)
    peak, lost = report.peak_of(document), loss(job.output, lossless=job.lossless)
    # On one rank while the others have ended: nobody needs them any more.
    if in_tiles:
        rest = tile_comparison.run_rest(session, loaded, fit, padded, result, exact)
        told, alone = tile_comparison.told(session, clip.frames, rest, peak, lost), rest.whole
    else:
        alone = compare.run_through(session, loaded, fit, padded, None, " on one rank") if job.compare else None
        told = compare.told(session, clip.frames, result, alone, peak, lost)
    document |= told.numbers | {"input": str(job.source), "output": str(job.output)}
    typer.echo(f"{job.output}: {report.clip_line(fit, clip.fps)}")
    typer.echo(f"{report.described(session, loaded, result.encode)}\n{told.text}", nl=False)
    if job.json is not None:
        write_json(job.json, document)
    if job.report is not None:
        run = pages.Run(
            name=job.source.name, output=job.output.name, lost=lost, clip=clip, result=result, alone=alone, told=told,
            handle=handle, spans=spans, words=job.words,
        )  # fmt: skip
        page = pages.roundtrip_report(session, loaded, fit, run)
        typer.echo(f"report: {write_report(job.report, page)}")
    if told.passed is False:
        raise HalovaeError(told.verdict)
