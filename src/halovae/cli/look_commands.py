"""`halovae compare`, `plan` and `doctor`: commands that look at what others have made, or would make."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from halovae.app import launch
from halovae.app.run_options import RunOptions
from halovae.app.run_ranks import run
from halovae.app.watch import guarded
from halovae.base.errors import InputError
from halovae.cli import flags

if TYPE_CHECKING:
    from halovae.app.session import Session


@flags.takes("compare")
def compare(context: typer.Context, **given: Any) -> int:
    """Compare two videos, two images or two latents files; exit code 1 if a gate fails."""
    with guarded():
        from halovae.app import compare_files

        gates = compare_files.compare(compare_files.CompareJob(words=tuple(context.obj), **given))
    failed = [gate for gate in gates if not gate.passed]
    for gate in failed:
        sys.stderr.write(f"halovae: gate failed: {gate}\n")
    return 1 if failed else 0


@flags.takes("plan")
def plan(
    context: typer.Context, *, height: int, width: int, num_frames: int, ranks: tuple[int, ...], link: str,
    memory: float | None, flops: float | None, bandwidth: float | None, json: Path | None, **how: Any,
) -> int:  # fmt: skip
    """Predict time, waiting, messages and memory of encode and decode, for every mode and cut."""
    from halovae.media.reader import check_size

    check_size(height, width)
    if (flops is None) != (bandwidth is None):
        raise InputError("--flops and --bandwidth belong together: give both, or none to measure this device")
    rates = None if flops is None or bandwidth is None else (flops * 1e12, bandwidth * 1e9)

    def on_rank(session: Session) -> None:
        from halovae.app import plan

        sizes = num_frames, height, width
        plan.plan(session, plan.PlanJob(sizes=sizes, ranks=ranks, link=link, memory=memory, rates=rates, json=json))

    started = 2 if link == "measured" and launch.place() is None else None
    return run(context.obj, RunOptions(ranks=started, **how), on_rank)


@flags.takes("doctor")
def doctor(context: typer.Context, *, ranks: int | None, device: str | None, clear_cache: bool) -> int:
    """Print versions and devices, measure the link between ranks, and prove that they compute exactly."""
    here = launch.place()
    if here is None and not clear_cache:
        ranks = 2 if ranks is None else ranks
        launch.check_ranks(ranks)
    from halovae.app import doctor as checks  # It takes seconds.

    if clear_cache:
        checks.clear_cache()
        return 0
    if here is None or (here.rank == 0 and not launch.was_launched()):
        typer.echo(checks.versions())
    if here is None:
        device = device or checks.fallback(ranks or 1)
        context.obj = ["doctor", f"--ranks={ranks}", *([] if device is None else [f"--device={device}"])]
    return run(context.obj, RunOptions(ranks=ranks, device=device), checks.prove)
