"""`halovae decode`: latents on disk to a clip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from halovae.app.run_options import run_options
from halovae.cli import flags

if TYPE_CHECKING:
    from halovae.app.session import Session


@dataclass(frozen=True, kw_only=True)
class _Job:
    source: Path
    output: Path
    lossless: bool
    json: Path | None


@flags.takes("decode")
def decode(context: typer.Context, *, source: Path, output: Path, lossless: bool, json: Path | None, **how: Any) -> int:
    """Decode latents to a video or an image."""
    from halovae.app.run_options import check_files
    from halovae.app.run_ranks import run
    from halovae.media import SUFFIXES

    options = run_options(**how)
    check_files(source, output, SUFFIXES, json)
    job = _Job(source=source, output=output, lossless=lossless, json=json)
    return run(context, options, lambda session: _on_rank(session, job))


def _on_rank(session: Session, job: _Job) -> None:
    from halovae.app import tables
    from halovae.app.clip_files import write_clip
    from halovae.base.files import write_json
    from halovae.media import check_still, codec, latents_file
    from halovae.media.vae_limits import Fit

    encoded, info = session.together("read", lambda advance: latents_file.load(job.source))
    check_still(job.output, info.frames)
    if session.options.model is None:
        session.options = replace(session.options, model=info.model)
    loaded = session.load()
    latents_file.check_shape(encoded, info, loaded.limits, loaded.source.class_name)
    fit = Fit(**{name: getattr(info, name) for name in Fit.__dataclass_fields__})
    encoded = encoded.to(session.device, session.dtype)
    calls = codec.decode_calls(loaded.vae, loaded.limits, encoded)
    with session.parallel(loaded.vae, gather="first") as handle:
        sample, half = session.measured(
            "decode", lambda after: codec.decode(loaded.vae, loaded.limits, encoded, after), handle, calls
        )
    document = tables.document(session, loaded, fit, {"decode": half})
    if not session.is_first:
        return
    sample = fit.crop(sample)
    if loaded.source.class_name != info.model_class:
        session.stages.note(f"the latents were made by {info.model} ({info.model_class})")
    write_clip(session, job.output, codec.Frames(sample), info.fps, times=info.times, lossless=job.lossless)
    if job.json is not None:
        write_json(job.json, document | {"input": str(job.source), "output": str(job.output)})
    typer.echo(f"{job.output}: {tables.clip_line(fit, info.fps)}")
    typer.echo(tables.described(session, loaded, half))
    typer.echo(tables.seconds_table({"decode": half}), nl=False)
