"""`halovae compare`: two results in numbers, with gates for scripts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from halovae.base.errors import InputError
from halovae.cli import flags

if TYPE_CHECKING:
    from halovae.evaluation import ClipComparison, CutLines, Gate, LatentComparison


@dataclass(frozen=True, kw_only=True)
class _Job:
    one: Path
    other: Path
    min_ssim: float | None
    min_psnr: float | None
    max_l2: float | None
    grid: tuple[int, int, int] | None
    trim: bool
    json: Path | None
    report: Path | None
    words: tuple[str, ...]


@flags.takes("compare")
def compare(context: typer.Context, *, one: Path, other: Path, grid: str | None, **rest: Any) -> int:
    """Compare two videos, two images or two latents files; exit code 1 if a gate fails."""
    from halovae.app.run_options import check_written, parse_grid
    from halovae.app.watch import guarded
    from halovae.base.files import check_input

    job = _Job(one=one, other=other, grid=parse_grid(grid), words=tuple(context.obj), **rest)
    for path in (one, other):
        check_input(path)
    check_written(job.json, job.report)
    from halovae.app.clip_files import is_latents  # Not before: it imports much.

    kinds = is_latents(one), is_latents(other)
    if kinds[0] != kinds[1]:
        raise InputError(f"{one} and {other} are latents and a picture: compare two of one kind")
    _check_gates(job, *kinds)
    with guarded():
        gates = _compare_latents(job) if kinds[0] else _compare_clips(job)
    failed = [gate for gate in gates if not gate.passed]
    for gate in failed:
        sys.stderr.write(f"halovae: gate failed: {gate}\n")
    return 1 if failed else 0


def _check_gates(job: _Job, one: bool, other: bool) -> None:
    pictures_only = {"--min-ssim": job.min_ssim, "--min-psnr": job.min_psnr, "--grid": job.grid}
    wrong = [name for name, value in pictures_only.items() if value is not None] if one else []
    if wrong:
        raise InputError(
            "\n".join(f"{name} is for pictures, but {job.one} holds latents: use --max-l2" for name in wrong)
        )
    if job.max_l2 is not None and not one:
        raise InputError(f"--max-l2 is for latents, but {job.one} is a picture: use --min-ssim or --min-psnr")


def _compare_clips(job: _Job) -> list[Gate]:
    from halovae.app.clip_files import read_clips
    from halovae.app.session import Stages
    from halovae.evaluation import CutLines, clip_gates, compare_clips

    stages = Stages(speaks=True)
    with stages.stage("read") as advance:
        pair = read_clips(job.one, job.other, trim=job.trim, advance=advance)
    for note in pair.notes:
        stages.note(note)
    grid = None
    if job.grid is not None:
        height, width, overlap = job.grid
        grid = CutLines.every((height, width), pair.size, (overlap, overlap))
    with stages.stage("compare", pair.count) as advance:
        found = compare_clips(pair.reference, pair.result, grid, advance)
    gates = clip_gates(found, min_ssim=job.min_ssim, min_psnr=job.min_psnr)
    frames = f"{pair.count} frame{'s' * (pair.count != 1)} of {pair.size[1]}x{pair.size[0]}"
    lost = "" if found.is_identical else pair.lost
    _finish(job, frames, _clip_text(found) + (f"{lost}\n" if lost else ""), found.to_dict() | {"lost": lost}, gates)
    if job.report is not None:
        from halovae.app.pages import clips_report
        from halovae.evaluation.report import write_report

        page = clips_report(job.one, job.other, pair.reference, pair.result, found, gates, lost, job.words)
        typer.echo(f"report: {write_report(job.report, page)}")
    return gates


def _compare_latents(job: _Job) -> list[Gate]:
    from halovae.app.clip_files import read_latents
    from halovae.app.session import Stages
    from halovae.evaluation import compare_latents, latent_gates

    pair = read_latents(job.one, job.other, trim=job.trim)
    for note in pair.notes:
        Stages(speaks=True).note(note)
    found = compare_latents(pair.reference, pair.result)
    gates = latent_gates(found, max_l2=job.max_l2)
    shape = "latents " + "x".join(map(str, pair.reference.shape))
    _finish(job, shape, _latent_text(found), found.to_dict(), gates)
    if job.report is not None:
        from halovae.app.pages import latents_report
        from halovae.evaluation.report import write_report

        page = latents_report(job.one, job.other, found, gates, job.words)
        typer.echo(f"report: {write_report(job.report, page)}")
    return gates


def _finish(job: _Job, what: str, text: str, numbers: dict[str, Any], gates: list[Gate]) -> None:
    from halovae.base.files import write_json

    typer.echo(f"{job.other} against {job.one}: {what}\n{text}", nl=False)
    if job.json is not None:
        document = {"reference": str(job.one), "result": str(job.other), **numbers}
        write_json(job.json, document | {"gates": [gate.to_dict() for gate in gates]})


def _clip_text(found: ClipComparison) -> str:
    from halovae.app.tables import table
    from halovae.evaluation.numbers import decibel

    if found.is_identical:
        return "identical: no level of any pixel differs, in any frame\n"
    worst = found.frames[found.worst]
    rows = [("", "all", f"worst frame ({worst.frame})")]
    if found.ssim is not None and worst.ssim is not None:
        rows.append(("SSIM", f"{found.ssim:.4f}", f"{worst.ssim:.4f}"))
    if found.ms_ssim is not None and worst.ms_ssim is not None:
        rows.append(("MS-SSIM", f"{found.ms_ssim:.4f}", f"{worst.ms_ssim:.4f}"))
    rows += [
        ("PSNR", decibel(found.psnr), decibel(worst.psnr)),
        ("largest difference, of 255", f"{found.largest:.4g}", f"{worst.largest:.4g}"),
        ("mean difference", f"{found.mean:.3g}", f"{worst.mean:.3g}"),
        ("pixels off by more than 1%", f"{found.share_off:.2%}", f"{worst.share_off:.2%}"),
        ("colour shift, red green blue", _shift(found.colour_shift), _shift(worst.colour_shift)),
    ]
    if found.drift is not None and found.flicker is not None:
        rows.append(("drift, first frame to last", f"{found.drift:+.3g}", ""))
        rows.append(("flicker", f"{found.flicker:.3g}", "" if worst.flicker is None else f"{worst.flicker:.3g}"))
    if found.seam is not None:
        rows.append(("seam energy", f"{found.seam:.2f}", ""))
    return table(rows) + _lines(found.grid)


def _shift(shift: tuple[float, float, float]) -> str:
    return " ".join(f"{value:+.2f}" for value in shift)


def _lines(grid: CutLines) -> str:
    if not grid:
        return ""
    rows, columns = (" ".join(map(str, lines)) or "none" for lines in (grid.rows, grid.columns))
    return f"seams at rows {rows}, columns {columns}\n"


def _latent_text(found: LatentComparison) -> str:
    from halovae.app.tables import table

    if found.largest == 0:
        return "identical: no latent differs\n"
    rows = [("", "relative L2", "largest", "shift")]
    rows += [
        (f"channel {c.channel}", f"{c.relative_l2:.3e}", f"{c.largest:.3e}", f"{c.shift:+.2e}") for c in found.channels
    ]
    rows.append(("all", f"{found.relative_l2:.3e}", f"{found.largest:.3e}", ""))
    rows.append((f"worst frame ({found.worst})", f"{found.frames[found.worst]:.3e}", "", ""))
    return table(rows)
