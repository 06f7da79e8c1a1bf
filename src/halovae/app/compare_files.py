"""`halovae compare`: two files of one kind and one size, or trimmed to it: how far they are apart, and gates on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from torch import Tensor

from halovae import media
from halovae.app.pages import command
from halovae.app.session import Stages
from halovae.app.tables import Row, table
from halovae.base.errors import InputError, counted
from halovae.base.files import write_json
from halovae.evaluation import (
    ClipComparison,
    CutLines,
    Gate,
    LatentComparison,
    clip_gates,
    compare_clips,
    compare_latents,
    latent_gates,
)
from halovae.evaluation.report import ClipSection, LatentSection, Report, write_report
from halovae.evaluation.scores import decibel
from halovae.media import latents_file

_ROUNDING = 5e-4
"""Rates nearer than this may be one rate: some formats keep times in milliseconds. 24 and 24000/1001 are 1e-3 apart."""


@dataclass(frozen=True, kw_only=True)
class CompareJob:
    """What one comparison shall do."""

    one: Path
    """The reference."""
    other: Path
    """The result."""
    min_ssim: float | None
    min_psnr: float | None
    max_l2: float | None
    grid: tuple[int, int, int] | None
    """Rows and columns from line to line, and overlap."""
    trim: bool
    json: Path | None
    report: Path | None
    words: tuple[str, ...]
    """The command line."""


_Found = tuple[str, dict[str, Any], Report]
"""For the terminal, for `--json`, and for the page."""


def compare(job: CompareJob) -> Sequence[Gate]:
    """Compare, and tell, write and show what was found; returns the gates that were asked for."""
    stages = Stages(speaks=True)
    text, numbers, page = _compare_latents(job, stages) if _is_latents(job) else _compare_clips(job, stages)
    typer.echo(f"{job.other} against {job.one}: {text}", nl=False)
    if job.json is not None:
        document = {"reference": str(job.one), "result": str(job.other), **numbers}
        write_json(job.json, document | {"gates": [gate.to_dict() for gate in page.gates]})
    if job.report is not None:
        typer.echo(f"report: {write_report(job.report, page)}")
    return page.gates


def _is_latents(job: CompareJob) -> bool:
    one, other = (path.suffix.lower() == latents_file.SUFFIX for path in (job.one, job.other))
    if one != other:
        kinds = " and ".join(f"{path} is {_kind(path)}" for path in (job.one, job.other))
        raise InputError(f"{kinds}: compare two of one kind")
    pictures_only = {"--min-ssim": job.min_ssim, "--min-psnr": job.min_psnr, "--grid": job.grid}
    wrong = [name for name, value in pictures_only.items() if one and value is not None]
    if wrong:
        raise InputError(
            "\n".join(f"{name} is for pictures, but {job.one} holds latents: use --max-l2" for name in wrong)
        )
    if job.max_l2 is not None and not one:
        raise InputError(f"--max-l2 is for latents, but {job.one} is {_kind(job.one)}: use --min-ssim or --min-psnr")
    return one


def _kind(path: Path) -> str:
    """What a file is, in words."""
    if path.suffix.lower() == latents_file.SUFFIX:
        return "a file of latents"
    return "an image" if media.inspect(path).is_image else "a video"


def _page(
    job: CompareJob, section: ClipSection | LatentSection, gates: list[Gate], apart: str, facts: dict[str, str]
) -> Report:
    """What the page says; `apart` is how far the two are from each other, in words, and nothing where they are the
    same."""
    failed = "; ".join(str(gate) for gate in gates if not gate.passed)
    is_clip = isinstance(section, ClipSection)
    same = f"Identical in every {'level of every frame' if is_clip else 'latent'}."
    of_gates = f"{failed}." if failed else "All gates passed."
    return Report(
        title=section.title,
        # Nobody has said how near is near enough: then only what is the same has passed.
        passed=not failed if gates else not apart or None,
        verdict=of_gates if gates else apart or same,
        facts=facts,
        clips=[section] if is_clip else (),
        latents=() if is_clip else [section],
        gates=gates,
        command=command(job.words),
    )


# ---- videos and images -----------------------------------------------------------------------------------------------


def _compare_clips(job: CompareJob, stages: Stages) -> _Found:
    """Of each clip one frame at a time is in memory."""
    with stages.stage("read") as advance:
        films = [media.Film(path, advance=advance) for path in (job.one, job.other)]
    _trim(job, stages, *films)
    reference, result = films
    grid = None
    if job.grid is not None:
        *step, overlap = job.grid
        grid = CutLines.every((step[0], step[1]), reference.size, (overlap, overlap))
    with stages.stage("compare", reference.count) as advance:
        found = compare_clips(reference, result, grid, advance)
    lost = "" if found.is_identical else _lost({film.path.name: film.lossy for film in films if film.lossy})
    height, width = reference.size
    section = ClipSection(
        title=f"{job.other.name} against {job.one.name}",
        text=f"Every pixel of the two files as they decode, in 8-bit RGB. {lost}".rstrip(),
        reference_name=job.one.name,
        result_name=job.other.name,
        reference=reference,
        result=result,
        found=found,
        borders=found.grid,
        borders_name="given lines",
    )
    apart = f"PSNR is {decibel(found.psnr)}{', with what codecs lost' if lost else ''}."
    gates = clip_gates(found, min_ssim=job.min_ssim, min_psnr=job.min_psnr)
    facts = {"Frames": str(reference.count), "Size": f"{width}x{height}"}
    text = f"{counted(reference.count, 'frame')} of {width}x{height}\n{_clip_text(found)}" + (
        f"{lost}\n" if lost else ""
    )
    page = _page(job, section, gates, "" if found.is_identical else apart, facts)
    return text, found.to_dict() | {"lost": lost}, page


def _trim(job: CompareJob, stages: Stages, one: media.Film, other: media.Film) -> None:
    """Cut both to what they have in common, sizes around the centre, where that was asked for.

    Raises:
        InputError: they differ in length, size or rate, and it was not.
    """
    rates = one.pace.fps, other.pace.fps
    pairs = {
        "frames": (one.count, other.count),
        "size": tuple(f"{film.size[1]}x{film.size[0]}" for film in (one, other)),
        "rate": rates if abs(rates[0] / rates[1] - 1) >= _ROUNDING else (rates[0], rates[0]),
    }
    differing = [f"{what} {pair[0]} and {pair[1]}" for what, pair in pairs.items() if len(set(pair)) > 1]
    remedy = "use --trim to compare what they share"
    if len(set(pairs["size"])) > 1:  # A piece out of the middle of the larger one is another picture.
        remedy = "scale one of them, or use halovae roundtrip --compare, which compares at one size"
    if differing and not job.trim:
        raise InputError(f"{job.one} and {job.other} differ: {', '.join(differing)}: {remedy}")
    for text in differing:
        stages.note(f"{'cropped around the centre, not scaled' if text.startswith('size') else 'trimmed'}: {text}")
    count, height, width = map(min, (one.count, *one.size), (other.count, *other.size))
    for film in (one, other):
        film.trim(count, height, width)


def _lost(lossy: dict[str, str]) -> str:
    """What codecs, by the file's name, have to do with the difference."""
    if not lossy:
        return ""
    files = " and ".join(f"{name} ({codec})" for name, codec in lossy.items())
    return (
        f"What the codec of {files} loses is in these numbers too: files differ by more than what was computed. "
        "To see that alone, write them with --lossless."
    )


def _clip_text(found: ClipComparison) -> str:
    if found.is_identical:
        return "identical: no level of any pixel differs, in any frame\n"
    worst = found.frames[found.worst]
    rows = [
        ("", "all", f"worst frame ({worst.frame})"),
        *_row("SSIM", ".4f", found.ssim, worst.ssim),
        *_row("MS-SSIM", ".4f", found.ms_ssim, worst.ms_ssim),
        ("PSNR", decibel(found.psnr), decibel(worst.psnr)),
        *_row("largest difference, of 255", ".4g", found.largest, worst.largest),
        *_row("mean difference", ".3g", found.mean, worst.mean),
        *_row("pixels off by more than 1%", ".2%", found.share_off, worst.share_off),
        ("colour shift, red green blue", _shift(found.colour_shift), _shift(worst.colour_shift)),
        *_row("drift, first frame to last", "+.3g", found.drift),
        *_row("flicker", ".3g", found.flicker, worst.flicker),
        *_row("seam energy", ".2f", found.seam),
    ]
    if not found.grid:
        return table(rows)
    lines = [" ".join(map(str, lines)) or "none" for lines in (found.grid.rows, found.grid.columns)]
    return f"{table(rows)}seams at rows {lines[0]}, columns {lines[1]}\n"


def _row(name: str, form: str, whole: float | None, worst: float | None = None) -> list[Row]:
    """Of a number that is known."""
    return [] if whole is None else [(name, f"{whole:{form}}", "" if worst is None else f"{worst:{form}}")]


def _shift(shift: tuple[float, float, float]) -> str:
    return " ".join(f"{value:+.2f}" for value in shift)


# ---- latents ---------------------------------------------------------------------------------------------------------


def _compare_latents(job: CompareJob, stages: Stages) -> _Found:
    reference, result = _read_latents(job, stages)
    found = compare_latents(reference, result)
    section = LatentSection(
        title=f"{job.other.name} against {job.one.name}", text="", reference_name=job.one.name,
        result_name=job.other.name, found=found,
    )  # fmt: skip
    apart = f"The relative L2 distance is {found.relative_l2:.1e}." if found.largest else ""
    text = f"latents {'x'.join(map(str, reference.shape))}\n{_latent_text(found)}"
    return text, found.to_dict(), _page(job, section, latent_gates(found, max_l2=job.max_l2), apart, {})


def _read_latents(job: CompareJob, stages: Stages) -> tuple[Tensor, Tensor]:
    """Both, cut to the length that they have in common, from the start, where that was asked for.

    Raises:
        InputError: they differ in length and it was not; or in more than that.
    """
    (reference, _), (result, _) = (latents_file.load(path) for path in (job.one, job.other))
    shapes = [tuple(tensor.shape) for tensor in (reference, result)]
    names, both = f"{job.one} and {job.other}", f"shapes {shapes[0]} and {shapes[1]}"
    if reference.ndim != result.ndim or reference.shape[1] != result.shape[1]:
        raise InputError(f"{names} hold latents of {both}: not of one VAE")
    if shapes[0] == shapes[1]:
        return reference, result
    if reference.shape[-2:] != result.shape[-2:]:  # Latents at one place show other places of the pictures.
        raise InputError(f"{names} differ in height or width: {both}: encode both at one size (--height, --width)")
    if not job.trim:
        raise InputError(f"{names} differ: {both}: use --trim to compare what they share")
    stages.note(f"trimmed: {both}")
    shared = tuple(slice(min(pair)) for pair in zip(*shapes, strict=True))
    return reference[shared], result[shared]


def _latent_text(found: LatentComparison) -> str:
    if found.largest == 0:
        return "identical: no latent differs\n"
    return table(
        [
            ("", "relative L2", "largest", "shift"),
            *((f"channel {c.channel}", f"{c.relative_l2:.3e}", f"{c.largest:.3e}", f"{c.shift:+.2e}")
              for c in found.channels),
            ("all", f"{found.relative_l2:.3e}", f"{found.largest:.3e}", ""),
            (f"worst frame ({found.worst})", f"{found.frames[found.worst]:.3e}", "", ""),
        ]
    )  # fmt: skip
