"""What `--help` looks like: options in groups, whole sentences, and an example that can be copied.

Typer's own groups need its boxes, which cut the names of long options in a terminal of usual width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

ARGUMENTS = "Arguments"
FILES = "Model and files"
CONTENT = "What to make"
CLIP = "Part and size of the clip"
DENOISING = "Denoising"
CLIENTS = "Clients"
RANKS = "Ranks"
VAE = "How the VAE runs"
DEVICE = "Device, precision and memory"
REPORTS = "What to tell"
_OTHER = "Options"
_HYPHEN = "\N{NON-BREAKING HYPHEN}"
_WIDTH = 100
"""Of text, in a terminal that is wide enough."""


class Command(TyperCommand):
    """A command whose options are listed by their `rich_help_panel`, and its epilog as an example, line by line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.context_settings["max_content_width"] = _WIDTH

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records: list[tuple[str, tuple[str, str]]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                records.append((ARGUMENTS if argument else _panel(parameter), record))
        _write(formatter, records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Example"):
                formatter.write(
                    "".join(f"{' ' * formatter.current_indent}{line}\n" for line in self.epilog.splitlines())
                )


class CommandGroup(TyperGroup):
    """A group whose commands are listed by their `rich_help_panel`, each with all that its summary says."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        _write(formatter, [(_panel(one), (name, (one.help or "").splitlines()[0])) for name, one in commands if one])


def _panel(item: Any) -> str:
    panel = getattr(item, "rich_help_panel", None)
    return panel if isinstance(panel, str) else _OTHER


def _write(formatter: Any, records: Iterable[tuple[str, tuple[str, str]]]) -> None:
    """Groups in the order of their first members."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for panel, record in records:
        groups.setdefault(panel, []).append(record)
    for panel, members in groups.items():
        with formatter.section(panel):
            # Names with hyphens are copied from here, so no line ends within one.
            formatter.write_dl([(name, re.sub(r"(?<=\w)-(?=\w)", _HYPHEN, words)) for name, words in members])
    formatter.buffer[:] = [text.replace(_HYPHEN, "-") for text in formatter.buffer]
