"""The report on disk: `report.json`, then `index.html`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import halovae.evaluation.report.figures as figures
from halovae.base.errors import InputError
from halovae.base.files import atomic, check_output, reason, write_json
from halovae.evaluation.report.document import ClipSection, Report
from halovae.evaluation.report.drawings import clip_curves, gain, heat_map, heat_scale, latent_curves, singles, triples
from halovae.evaluation.report.lanes import INTERVALS, KINDS, WHOLES, Lane, balance

PAGE, NUMBERS = "index.html", "report.json"
_FILTERS = ("fixed", "group", "level", "limit", "ratio", "seconds", "value")


def check_report(folder: Path) -> None:
    """Refuse a folder that the report can't be written to, before any work is done for it."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--report {folder} is a file: give a folder")
    check_output(folder / PAGE if folder.exists() else folder.parent / PAGE, (".html",))


def write_report(folder: Path, report: Report) -> Path:
    """Write the numbers, then the page, whose path is returned."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"can't make folder {folder}: {reason(error)}") from error
    write_json(folder / NUMBERS, report.to_dict())
    text = render(report)
    with atomic(folder / PAGE) as draft:
        draft.write_text(text, encoding="utf-8")
    return folder / PAGE


def render(report: Report) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=PackageLoader("halovae.evaluation.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({name: getattr(figures, name) for name in _FILTERS}, props=vars)
    return environment.get_template("page.html.j2").render(
        report=report,
        clips=[_drawn(section) for section in report.clips],
        pictures=[(section, singles(section.frames)) for section in report.pictures],
        latents=[{"said": section, "curves": latent_curves(section.found)} for section in report.latents],
        kinds=_kinds(report.lanes),
        wholes=WHOLES,
        intervals=INTERVALS,
        balance=balance(report.lanes),
        heat_scale=heat_scale(),
    )


def _drawn(section: ClipSection) -> dict[str, Any]:
    """A section with everything drawn."""
    frames = triples(section.reference, section.result, section.found)
    factor = gain(section.reference, section.result)
    return {
        "said": section,
        "gain": factor,
        "drawn": figures.drawn_words(factor, section.found.largest),
        "frames": frames,
        "worst": next(frame for frame in frames if frame.frame == section.found.frames[section.found.worst].frame),
        "figures": figures.clip_figures(section.found),
        "curves": clip_curves(section.found),
        "heat": heat_map(section.found.energy),
    }


def _kinds(lanes: Sequence[Lane]) -> dict[str, str]:
    """What happened at all."""
    found: set[str] = set().union(*(lane.seconds for lane in lanes))
    return {kind: name for kind, name in KINDS.items() if kind in found}
