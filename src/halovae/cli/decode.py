"""`halovae decode`: latents on disk to a clip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halovae.app.run_options import RunOptions, parse_axis, parse_work
from halovae.cli import flags, mode_flags

if TYPE_CHECKING:
    from halovae.app.session import Session

_Latents = Annotated[
    Path, typer.Argument(metavar="LATENTS", help="A file that halovae encode has made.", show_default=False)
]
_Model = Annotated[
    str | None,
    typer.Option(metavar="DIR_OR_ID", help="As for encode.", show_default="the one that the latents were made with"),
]


@dataclass(frozen=True, kw_only=True)
class _Job:
    source: Path
    output: Path
    lossless: bool
    json: Path | None


def decode(
    context: typer.Context,
    source: _Latents,
    output: flags.VideoOutput,
    model: _Model = None,
    ranks: flags.Ranks = None,
    axis: flags.Axis = "auto",
    mode: mode_flags.Mode = None,
    untiled: mode_flags.Untiled = False,
    tile_size: mode_flags.TileSize = None,
    tile_overlap: mode_flags.TileOverlap = None,
    vae_use_tiling: mode_flags.UseTiling = False,
    vae_patch_parallel_size: mode_flags.PatchParallelSize = None,
    dtype: flags.DtypeOption = None,
    device: flags.Device = None,
    lossless: flags.Lossless = False,
    json: flags.Json = None,
) -> int:
    """Decode latents to a video or an image."""
    from halovae.app.checks import check_files
    from halovae.app.run_ranks import run
    from halovae.media import SUFFIXES

    work = parse_work(mode, tile_size, tile_overlap, vae_use_tiling, vae_patch_parallel_size, untiled)
    cut = parse_axis(axis, work.mode)
    run_options = RunOptions(model=model, ranks=ranks, axis=cut, dtype=dtype, device=device, work=work)
    check_files(source, output, SUFFIXES, json)
    job = _Job(source=source, output=output, lossless=lossless, json=json)
    return run(context, run_options, lambda session: _on_rank(session, job))


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
