"""`halovae warm-up`: what a first call would find out and compile, ahead of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import typer

from halovae.app.run_options import run_options
from halovae.cli import flags

if TYPE_CHECKING:
    from halovae.app.session import Session


@flags.takes("warm-up")
def warm_up(context: typer.Context, *, height: int, width: int, num_frames: int, **how: Any) -> int:
    """Encode and decode noise once, so that what is found out and compiled in first calls is on disk afterwards."""
    from halovae.app.run_ranks import run

    return run(context, run_options(**how), lambda session: _on_rank(session, (num_frames, height, width)))


def _on_rank(session: Session, sizes: tuple[int, int, int]) -> None:
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
