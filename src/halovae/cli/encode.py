"""`halovae encode`: a clip to latents on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from halovae.app.run_options import RunOptions, parse_axis, parse_work
from halovae.cli import flags, mode_flags

if TYPE_CHECKING:
    from halovae.app.session import Loaded, Session
    from halovae.media import Clip, FrameRange
    from halovae.media.latents_file import LatentsInfo
    from halovae.media.vae_limits import Fit


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
    source: flags.Source,
    output: flags.LatentsOutput,
    model: flags.Model = None,
    ranks: flags.Ranks = None,
    axis: flags.Axis = "auto",
    mode: mode_flags.Mode = None,
    untiled: mode_flags.Untiled = False,
    tile_size: mode_flags.TileSize = None,
    tile_overlap: mode_flags.TileOverlap = None,
    vae_use_tiling: mode_flags.UseTiling = False,
    vae_patch_parallel_size: mode_flags.PatchParallelSize = None,
    frames: flags.Frames = None,
    height: flags.Height = None,
    width: flags.Width = None,
    dtype: flags.DtypeOption = None,
    device: flags.Device = None,
    json: flags.Json = None,
) -> int:
    """Encode a video or an image to latents, with all that `halovae decode` needs."""
    from halovae.app.checks import check_files
    from halovae.app.run_ranks import run
    from halovae.media import FrameRange, inspect

    work = parse_work(mode, tile_size, tile_overlap, vae_use_tiling, vae_patch_parallel_size, untiled)
    cut = parse_axis(axis, work.mode)
    run_options = RunOptions(model=model, ranks=ranks, axis=cut, dtype=dtype, device=device, work=work)
    frame_range = None if frames is None else FrameRange.parse(frames)
    check_files(source, output, (".safetensors",), json)
    inspect(source)
    job = _Job(source=source, output=output, frames=frame_range, height=height, width=width, json=json)
    return run(context, run_options, lambda session: _on_rank(session, job))


def _on_rank(session: Session, job: _Job) -> None:
    from halovae.app import tables
    from halovae.app.clip_files import read_clip
    from halovae.base.files import write_json
    from halovae.media import codec, latents_file

    clip = read_clip(session, job.source, job.frames, job.height, job.width)
    loaded = session.load()
    fit = session.fit(loaded, clip.frames.shape[:3])
    padded = fit.pad(codec.to_tensor(clip.frames, session.dtype, session.device))
    calls = fit.padded_frames if loaded.limits.per_frame else 1
    with session.parallel(loaded.vae, gather="first") as handle:
        encoded, half = session.measured(
            "encode", lambda after: codec.encode(loaded.vae, loaded.limits, padded, after), handle, calls
        )
    document = tables.document(session, loaded, fit, {"encode": half})
    if not session.is_first:
        return
    latents_file.save(job.output, encoded, _info(loaded, clip, fit))
    if job.json is not None:
        write_json(job.json, document | {"input": str(job.source), "output": str(job.output)})
    shape = "x".join(map(str, encoded.shape))
    typer.echo(f"{job.output}: latents {shape} of {tables.clip_line(fit, clip.fps)}")
    typer.echo(tables.described(session, loaded, half))
    typer.echo(tables.seconds_table({"encode": half}), nl=False)


def _info(loaded: Loaded, clip: Clip, fit: Fit) -> LatentsInfo:
    from halovae.media.latents_file import LatentsInfo, scaling_of

    return LatentsInfo(
        model=loaded.source.model,
        model_class=loaded.source.class_name,
        scaling=scaling_of(loaded.vae.config),
        fps=clip.fps,
        times=clip.times,
        **vars(fit),
    )
