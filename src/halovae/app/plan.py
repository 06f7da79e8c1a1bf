"""`halovae plan`: what a VAE will take on so many ranks, before there are any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import typer

from halovae.app.session import Session
from halovae.app.survey import Row, Survey, Way
from halovae.base.errors import InputError, counted
from halovae.base.files import write_json
from halovae.base.memory import free_bytes
from halovae.base.options import HALVES
from halovae.comm.bandwidth import LINKS, LinkSpeed, measure
from halovae.media import models, vae_limits
from halovae.predict.predictor import Prediction
from halovae.predict.rates import GivenSpeed, MeasuredSpeed

_GIB = 2**30
_UNSTEADY = 0.05
"""Share of trials without two that agree, beyond which it is said."""
_TOO_GOOD = 1.2
_HEADS = "mode", "ranks", "cut or tiles", "seconds", "waiting", "messages", "MiB sent", "efficiency", "GiB", ""
_WIDTHS = 5, 5, 12, 9, 8, 8, 9, 10, 7, 0
"""Of the columns: a row is printed before the next ones are known."""


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """What a plan is made for."""

    sizes: tuple[int, int, int]
    """Frames, height and width."""
    ranks: tuple[int, ...]
    link: str
    memory: float | None
    rates: tuple[float, float] | None
    """Floating-point operations and bytes per second."""
    json: Path | None


def plan(session: Session, job: PlanJob) -> None:
    """Predict every way, and print it. Called on every rank."""

    link = measure(session.group, session.device) if job.link == "measured" else LINKS[job.link]
    if not session.is_first:
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what a rank has where there is one for each core
    try:
        _plan(session, job, link)
    finally:
        torch.set_num_threads(threads)


def _plan(session: Session, job: PlanJob, link: LinkSpeed) -> None:
    with session.stages.stage("the VAE's config"):
        name, vae = models.find_skeleton(session.options.model)
        limits = vae_limits.limits_of(vae)
        padded = limits.fit(*job.sizes)
    for note in padded.notes:
        session.stages.note(note)
    room = free_bytes(session.device) if job.memory is None else job.memory * _GIB  # before trials take any
    room = 2**60 if room is None else room  # The system can't tell.
    given = job.rates and GivenSpeed(flops=job.rates[0], bandwidth=job.rates[1], device=session.device)
    with session.stages.stage("one rank"):
        speed = given or MeasuredSpeed(session.device, session.dtype)
        survey = Survey(vae, limits, padded, session.dtypes, speed, link)
    typer.echo(_heading(session, name, type(vae).__name__, job, survey, link, room))
    found = {half: _rows(session, survey, half, survey.ways(half, job.ranks), room) for half in HALVES}
    rows = [row.to_dict() | {"fits": row.memory <= room} for half in HALVES for row in found[half]]
    unsteady = speed.unsteady if isinstance(speed, MeasuredSpeed) else 0.0
    if job.json is not None:
        document = {"model": name, "weights": survey.weights, "link": vars(link), "room": room, "rows": rows}
        write_json(job.json, document | {"unsteady_trials": unsteady})
    for note in _doubts(found, unsteady):
        session.stages.note(note)
    _check_room(survey, found, room)


def _rows(session: Session, survey: Survey, half: str, ways: list[Way], room: float) -> list[Row]:
    """All ways to run a half, each printed when it is known."""
    typer.echo(f"\n{half}\n{_line(_HEADS)}")
    found: list[Row] = []
    for number, way in enumerate(ways):
        with session.stages.stage(f"{half}, {way.mode} on {way.ranks} ({number + 1} of {len(ways)})"):
            row = survey.row(half, way)
        found.append(row)
        if row.prediction:
            fits = row.memory <= room
            cells = *_cells(row, row.prediction), f"{row.memory / _GIB:.3g}", "" if fits else "does not fit"
            typer.echo(_line(cells))
    refused = [f"{row.mode} on {row.ranks}: {row.refusal}" for row in found if not row.prediction]
    for line in dict.fromkeys(refused):
        typer.echo(line)
    return found


def _doubts(found: dict[str, list[Row]], unsteady: float) -> list[str]:
    """What makes one doubt the times."""
    notes: list[str] = []
    if unsteady > _UNSTEADY:
        notes.append(
            f"{100 * unsteady:.0f} % of the trials took another time at each try, since this machine does other work:"
            " times may be far off; plan again when it rests, or give --flops and --bandwidth"
        )
    best = max((row.efficiency or 0.0, half, row) for half, rows in found.items() for row in rows)
    efficiency, half, row = best
    if efficiency > _TOO_GOOD:
        notes.append(
            f"an efficiency of {efficiency:.2f} ({half}, {row.mode} on {row.ranks}) means that parts of the picture"
            " were tried to be cheaper than the whole of it: small tensors stay in caches and need no new memory;"
            " on a machine that does other work it may be its noise"
        )
    return notes


def _heading(session: Session, name: str, kind: str, job: PlanJob, survey: Survey, link: LinkSpeed, room: float) -> str:
    frames, height, width = job.sizes
    device = "cpu, one thread per rank" if session.device.type == "cpu" else str(session.device)
    device = f"{job.rates[0] / 1e12:g} TFLOP/s, {job.rates[1] / 1e9:g} GB/s" if job.rates else f"{device}, measured"
    return (
        f"{name} ({kind}), {session.dtype_words}, {survey.weights / _GIB:.3g} GiB of weights\n"
        f"{counted(frames, 'frame')} of {width}x{height}\n"
        f"device {device}, {room / _GIB:.3g} GiB free; link {job.link}, {link}"
    )


def _line(cells: tuple[str, ...]) -> str:
    first, *others = (f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))
    return "  ".join([f"{first.strip():<{_WIDTHS[0]}}", *others]).rstrip()


def _cells(row: Row, found: Prediction) -> tuple[str, ...]:
    counts = str(found.messages), f"{found.bytes / 2**20:.1f}"
    efficiency = "" if row.efficiency is None else f"{row.efficiency:.2f}"
    return row.mode, str(row.ranks), found.cut, f"{found.seconds:.3f}", f"{found.exposed:.3f}", *counts, efficiency


def _check_room(survey: Survey, found: dict[str, list[Row]], room: float) -> None:
    """Refuse a clip of which a half fits in none of the ways that were asked for, with the number of ranks that would
    do."""
    for half, rows in found.items():
        able = [row for row in rows if row.prediction is not None]
        if not able:
            raise InputError(f"{half} can be run in no mode: {rows[0].refusal}")
        least = min(row.memory for row in able)
        if least <= room:
            continue
        enough = survey.enough_ranks(half, int(room))
        remedy = f"{enough} ranks in exact mode would do" if enough else "no number of ranks would do"
        raise InputError(
            f"{half} needs {least / _GIB:.3g} GiB on a rank at the least, and {room / _GIB:.3g} are free: {remedy}"
        )
