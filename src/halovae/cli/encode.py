"""`halovae encode`: a clip to latents on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from halovae.app.run_options import run_options
from halovae.cli import flags

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


@flags.takes("encode")
def encode(
    context: typer.Context, *, source: Path, output: Path, frames: str | None, height: int | None, width: int | None,
    json: Path | None, **how: Any,
) -> int:  # fmt: skip
    """Encode a video or an image to latents, with all that `halovae decode` needs."""
    from halovae.app.run_options import check_files
    from halovae.app.run_ranks import run
    from halovae.media import FrameRange, inspect

    options = run_options(**how)
    frame_range = None if frames is None else FrameRange.parse(frames)
    check_files(source, output, (".safetensors",), json)
    inspect(source)
    job = _Job(source=source, output=output, frames=frame_range, height=height, width=width, json=json)
    return run(context, options, lambda session: _on_rank(session, job))


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
