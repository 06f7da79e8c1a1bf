"""The report of a run: numbers as JSON, then one HTML page that holds everything and asks no network for anything."""

from halovae.evaluation.report.lanes import Lane, lanes
from halovae.evaluation.report.page import (
    ClipSection,
    LatentSection,
    PictureSection,
    Report,
    check_report,
    write_report,
)

__all__ = ["ClipSection", "Lane", "LatentSection", "PictureSection", "Report", "check_report", "lanes", "write_report"]
