"""The report on disk: `report.json`, then `index.html`."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

import halovae.evaluation.report.figures as figures
from halovae.base.errors import InputError
from halovae.base.files import atomic, check_output, reason, write_json
from halovae.base.verdicts import processor
from halovae.evaluation import ClipComparison, CutLines, Frames, Gate, LatentComparison
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
    environment.filters.update({name: getattr(figures, name) for name in _FILTERS})
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
        "worst": next(frame for frame in frames if frame["frame"] == section.found.frames[section.found.worst].frame),
        "figures": figures.clip_figures(section.found),
        "curves": clip_curves(section.found),
        "heat": heat_map(section.found.energy),
    }


def _kinds(lanes: Sequence[Lane]) -> dict[str, str]:
    """What happened at all."""
    found: set[str] = set().union(*(lane.seconds for lane in lanes))
    return {kind: name for kind, name in KINDS.items() if kind in found}


_PACKAGES = ("halovae", "torch", "diffusers", "av")


def machine() -> dict[str, str]:
    """Names and values, for people."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    facts = {
        "Date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        "System": platform.platform(),
        "Processor": f"{processor()}, {os.cpu_count()} cores",
        "Accelerator": "none" if accelerator is None else f"{torch.accelerator.device_count()} {accelerator.type}",
        "Python": platform.python_version(),
    }
    return facts | {name: version_of(name) for name in _PACKAGES}


def version_of(name: str) -> str:
    """Of an installed package, for people."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    title: str
    text: str
    """What is shown or compared, and why."""


@dataclass(frozen=True, kw_only=True)
class PictureSection(Section):
    """A clip that there is no reference for."""

    name: str
    frames: NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class LatentSection(Section):
    """Latents against their reference."""

    reference_name: str
    result_name: str
    found: LatentComparison

    def to_dict(self) -> dict[str, Any]:
        names = {"title": self.title, "reference": self.reference_name, "result": self.result_name}
        return names | self.found.to_dict()


@dataclass(frozen=True, kw_only=True)
class ClipSection(Section):
    """One clip against its reference."""

    reference_name: str
    result_name: str
    reference: Frames
    """(frames, height, width, 3), levels of 0 to 255."""
    result: Frames
    found: ClipComparison
    borders: CutLines = field(default_factory=CutLines)
    """Lines drawn on the heat map."""
    borders_name: str = ""
    """What they are: "shard borders", "tile borders"."""

    def to_dict(self) -> dict[str, Any]:
        names = {"title": self.title, "reference": self.reference_name, "result": self.result_name}
        borders = {"borders": {"name": self.borders_name, **self.borders.to_dict()}}
        return names | borders | self.found.to_dict()


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of it."""

    title: str
    verdict: str
    """The one sentence to read."""
    passed: bool | None = None
    """The mark above it; None where there was nothing to pass."""
    facts: dict[str, str] = field(default_factory=dict[str, str])
    """What was done, as names and values."""
    costs: Sequence[Sequence[str]] = ()
    """Time and memory as the terminal shows them: rows of words, the first one of headings."""
    costs_text: str = ""
    """What has to be known to read them."""
    pictures: Sequence[PictureSection] = ()
    clips: Sequence[ClipSection] = ()
    latents: Sequence[LatentSection] = ()
    gates: Sequence[Gate] = ()
    seconds: float = 0.0
    """Of the timeline."""
    lanes: Sequence[Lane] = ()
    machine: dict[str, str] = field(default_factory=machine)
    command: str = ""
    """The command line, as it can be typed again."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        timeline = {
            "seconds": self.seconds,
            "balance": balance(self.lanes),
            "ranks": [lane.to_dict() for lane in self.lanes],
        }
        return {
            "title": self.title,
            "verdict": self.verdict,
            "passed": self.passed,
            "facts": self.facts,
            "costs": [list(row) for row in self.costs],
            "gates": [gate.to_dict() for gate in self.gates],
            "clips": [section.to_dict() for section in self.clips],
            "latents": [section.to_dict() for section in self.latents],
            "timeline": timeline if self.lanes else None,
            "machine": self.machine,
            "command": self.command,
        }
