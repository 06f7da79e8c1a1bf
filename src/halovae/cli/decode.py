"""`halovae decode`: latents on disk to a clip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halovae.cli import modes, options
from halovae.cli.options import RunOptions

if TYPE_CHECKING:
    from halovae.cli.session import Session

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
    output: options.VideoOutput,
    model: _Model = None,
    ranks: options.Ranks = None,
    axis: options.Axis = "auto",
    mode: modes.Mode = None,
    tile_size: modes.TileSize = None,
    tile_overlap: modes.TileOverlap = None,
    vae_use_tiling: modes.UseTiling = False,
    vae_patch_parallel_size: modes.PatchParallelSize = None,
    dtype: options.DtypeOption = None,
    device: options.Device = None,
    lossless: options.Lossless = False,
    json: options.Json = None,
) -> int:
    """Decode latents to a video or an image."""
    from halovae.cli.checks import check_files
    from halovae.cli.run import run
    from halovae.media import SUFFIXES

    work = modes.parse_work(mode, tile_size, tile_overlap, vae_use_tiling, vae_patch_parallel_size)
    cut = options.parse_axis(axis, work.mode)
    run_options = RunOptions(model=model, ranks=ranks, axis=cut, dtype=dtype, device=device, work=work)
    check_files(source, output, SUFFIXES, json)
    job = _Job(source=source, output=output, lossless=lossless, json=json)
    return run(context, run_options, lambda session: _on_rank(session, job))


def _on_rank(session: Session, job: _Job) -> None:
    from halovae import codec, latents
    from halovae.cli import report
    from halovae.cli.clips import write_clip
    from halovae.files import write_json
    from halovae.fit import Fit
    from halovae.media import check_still

    encoded, info = session.together("read", lambda advance: latents.load(job.source))
    check_still(job.output, info.frames)
    if session.options.model is None:
        session.options = replace(session.options, model=info.model)
    loaded = session.load()
    latents.check_shape(encoded, info, loaded.limits, loaded.source.class_name)
    fit = Fit(**{name: getattr(info, name) for name in Fit.__dataclass_fields__})
    encoded = encoded.to(session.device, session.dtype)
    calls = codec.decode_calls(loaded.vae, loaded.limits, encoded)
    with session.parallel(loaded.vae, gather="first") as handle:
        sample, half = session.measured(
            "decode", lambda after: codec.decode(loaded.vae, loaded.limits, encoded, after), handle, calls
        )
    document = report.document(session, loaded, fit, {"decode": half})
    if not session.is_first:
        return
    sample = fit.crop(sample)
    if loaded.source.class_name != info.model_class:
        session.stages.note(f"the latents were made by {info.model} ({info.model_class})")
    write_clip(session, job.output, codec.Frames(sample), info.fps, times=info.times, lossless=job.lossless)
    if job.json is not None:
        write_json(job.json, document | {"input": str(job.source), "output": str(job.output)})
    typer.echo(f"{job.output}: {report.clip_line(fit, info.fps)}")
    typer.echo(report.described(session, loaded, half))
    typer.echo(report.seconds_table({"decode": half}), nl=False)
