"""`halovae roundtrip`: a clip through encode and decode, to see what a VAE makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from halovae.cli import options
from halovae.cli.options import RunOptions

if TYPE_CHECKING:
    from halovae.cli.session import Session
    from halovae.media import FrameRange


@dataclass(frozen=True, kw_only=True)
class _Job:
    source: Path
    output: Path
    frames: FrameRange | None
    height: int | None
    width: int | None
    compare: bool
    json: Path | None


def roundtrip(
    context: typer.Context,
    source: options.Source,
    output: options.VideoOutput,
    model: options.Model = None,
    ranks: options.Ranks = None,
    axis: options.Axis = "auto",
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    dtype: options.DtypeOption = None,
    device: options.Device = None,
    compare: options.Compare = False,
    json: options.Json = None,
) -> int:
    """Encode a video or an image, decode it again, and write what came out."""
    from halovae.cli.checks import check_files
    from halovae.cli.run import run
    from halovae.media import SUFFIXES, FrameRange, check_still, inspect

    run_options = RunOptions(model=model, ranks=ranks, axis=options.parse_axis(axis), dtype=dtype, device=device)
    frame_range = None if frames is None else FrameRange.parse(frames)
    check_files(source, output, SUFFIXES, json)
    if inspect(source).is_image:
        check_still(output, 1)
    job = _Job(source=source, output=output, frames=frame_range, height=height, width=width, compare=compare, json=json)
    return run(context, run_options, lambda session: _on_rank(session, job))


def _on_rank(session: Session, job: _Job) -> None:
    from halovae import codec
    from halovae.cli import compare, report
    from halovae.cli.clips import read_clip, write_clip
    from halovae.files import write_json
    from halovae.media import check_still

    clip = read_clip(session, job.source, job.frames, job.height, job.width)
    check_still(job.output, len(clip.frames))
    loaded = session.load()
    fit = session.fit(loaded, clip.frames.shape[:3])
    padded = fit.pad(codec.to_tensor(clip.frames, session.dtype, session.device))
    with session.parallel(loaded.vae) as handle:
        result = compare.run_through(session, loaded, fit, padded, handle)
    halves = {"encode": result.encode, "decode": result.decode}
    document = report.document(session, loaded, fit, halves)
    if not session.is_first:
        return
    write_clip(session, job.output, result.frames, clip.fps)
    ratio = report.psnr(clip.frames, result.frames)
    lines = f"{job.output}: {report.clip_line(fit, clip.fps)}\n"
    lines += report.described(session, loaded, result.encode.shards) + "\n"
    document |= {"input": str(job.source), "output": str(job.output), "psnr": report.finite(ratio)}
    if job.compare:
        # On one rank while the others have ended: nobody needs them any more.
        alone = compare.run_through(session, loaded, fit, padded, None, " un-parallel")
        found = compare.differences(result, alone)
        lines += compare.text(session.group.size, clip.frames, result, alone, found)
        document |= compare.as_document(clip.frames, alone, found)
    else:
        lines += report.seconds_table(halves) + f"PSNR to the source: {report.decibel(ratio)}\n"
    if job.json is not None:
        write_json(job.json, document)
    typer.echo(lines, nl=False)
