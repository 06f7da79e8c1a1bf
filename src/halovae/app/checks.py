"""Checks of a command's files before any process is started."""

from __future__ import annotations

from pathlib import Path

from halovae.base.errors import InputError
from halovae.base.files import check_input, check_output


def check_files(
    source: Path, output: Path, suffixes: tuple[str, ...], json: Path | None, report: Path | None = None
) -> None:
    """Refuse files that can't be read or written, and one file given for two things.

    Raises:
        InputError: says which.
    """
    check_input(source)
    check_output(output, suffixes)
    if json is not None:
        check_output(json, (".json",))
    if report is not None:
        from halovae.evaluation.report.page import check_report

        check_report(report)
    if output.exists() and output.samefile(source):
        raise InputError(f"output {output} is the input: give another name")
