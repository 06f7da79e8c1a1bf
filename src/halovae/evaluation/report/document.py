"""What a report says, before it is a page."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from numpy.typing import NDArray

from halovae.base.verdicts import processor
from halovae.evaluation import ClipComparison, CutLines, Frames, Gate, LatentComparison
from halovae.evaluation.report.lanes import Lane, balance

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
