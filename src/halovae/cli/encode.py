"""`halovae encode`: a clip to latents on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from halovae.cli import modes, options
from halovae.cli.options import RunOptions

if TYPE_CHECKING:
    from halovae.cli.session import Loaded, Session
    from halovae.fit import Fit
    from halovae.latents import LatentsInfo
    from halovae.media import Clip, FrameRange


@dataclass(frozen=True, kw_only=True)
class _Job:
    source: Path
    output: Path
    frames: FrameRange | None
    height: int | None
    width: int | None
    json: Path | None


def encode(
    context: typer.Context,
    source: options.Source,
    output: options.LatentsOutput,
    model: options.Model = None,
    ranks: options.Ranks = None,
    axis: options.Axis = "auto",
    mode: modes.Mode = None,
    tile_size: modes.TileSize = None,
    tile_overlap: modes.TileOverlap = None,
    vae_use_tiling: modes.UseTiling = False,
    vae_patch_parallel_size: modes.PatchParallelSize = None,
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    dtype: options.DtypeOption = None,
    device: options.Device = None,
    json: options.Json = None,
) -> int:
    """Encode a video or an image to latents, with all that `halovae decode` needs."""
    from halovae.cli.checks import check_files
    from halovae.cli.run import run
    from halovae.media import FrameRange, inspect

    work = modes.parse_work(mode, tile_size, tile_overlap, vae_use_tiling, vae_patch_parallel_size)
    cut = options.parse_axis(axis, work.mode)
    run_options = RunOptions(model=model, ranks=ranks, axis=cut, dtype=dtype, device=device, work=work)
    frame_range = None if frames is None else FrameRange.parse(frames)
    check_files(source, output, (".safetensors",), json)
    inspect(source)
    job = _Job(source=source, output=output, frames=frame_range, height=height, width=width, json=json)
    return run(context, run_options, lambda session: _on_rank(session, job))


def _on_rank(session: Session, job: _Job) -> None:
    from halovae import codec, latents
    from halovae.cli import report
    from halovae.cli.clips import read_clip
    from halovae.files import write_json

    clip = read_clip(session, job.source, job.frames, job.height, job.width)
    loaded = session.load()
    fit = session.fit(loaded, clip.frames.shape[:3])
    padded = fit.pad(codec.to_tensor(clip.frames, session.dtype, session.device))
    calls = fit.padded_frames if loaded.limits.per_frame else 1
    with session.parallel(loaded.vae, gather="first") as handle:
        encoded, half = session.measured(
            "encode", lambda after: codec.encode(loaded.vae, loaded.limits, padded, after), handle, calls
        )
    document = report.document(session, loaded, fit, {"encode": half})
    if not session.is_first:
        return
    latents.save(job.output, encoded, _info(loaded, clip, fit))
    if job.json is not None:
        write_json(job.json, document | {"input": str(job.source), "output": str(job.output)})
    shape = "x".join(map(str, encoded.shape))
    typer.echo(f"{job.output}: latents {shape} of {report.clip_line(fit, clip.fps)}")
    typer.echo(report.described(session, loaded, half))
    typer.echo(report.seconds_table({"encode": half}), nl=False)


def _info(loaded: Loaded, clip: Clip, fit: Fit) -> LatentsInfo:
    from halovae.latents import LatentsInfo, scaling_of

    return LatentsInfo(
        model=loaded.source.model,
        model_class=loaded.source.class_name,
        scaling=scaling_of(loaded.vae.config),
        fps=clip.fps,
        times=clip.times,
        **vars(fit),
    )
