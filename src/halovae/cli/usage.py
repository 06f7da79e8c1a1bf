"""What `--help` looks like: options in groups, whole sentences, and an example that can be copied; and what is told of
wrong flags and values: all of it at once.

Typer's own groups need its boxes, which cut the names of long options in a terminal of usual width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from halovae.base.errors import Faults

# Wrong flags and values. Typer has had click's errors under more than one name; this one is always its parent.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
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

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's, which stops at the first fault.

        Raises:
            InputError: one line for each flag, argument and value that is wrong by itself.
        """
        words, faults, rest = list(args), Faults(), list[str]()
        try:
            rest = super().parse_args(ctx, args)
        except USAGE_ERROR as error:
            self._note_all(ctx, words, faults)
            if not faults:
                faults.add(_one_line(error))
        known: Iterable[Any] = getattr(self.callback, "flags", ())
        for flag in sorted(known, key=lambda flag: flag.is_slow):
            if ctx.params.get(flag.name) is not None and (faults or not flag.is_slow):
                with faults.noted():
                    ctx.params[flag.name] = flag.value(ctx.params[flag.name])
        faults.check()
        return rest

    def _note_all(self, ctx: Any, words: list[str], faults: Faults) -> None:
        """Read word by word what can't be read as a whole."""
        while True:
            try:
                given, _, _ = self.make_parser(ctx).parse_args(args=list(words))
                break
            except USAGE_ERROR as error:
                faults.add(_one_line(error))
                # Where a flag is unknown, so is whether the next word belongs to it.
                wrong = getattr(error, "option_name", None)
                left = [word for word in words if word.partition("=")[0] != wrong]
                if len(left) == len(words):
                    return
                words = left
        gives = {flag.name: flag.gives for flag in getattr(self.callback, "flags", ())}
        for parameter in self.get_params(ctx):
            if parameter.is_eager or (faults and parameter.param_type_name == "argument"):
                continue
            try:
                parameter.handle_parse_result(ctx, given, [])
            except USAGE_ERROR as error:
                value, wanted = given.get(parameter.name), gives.get(parameter.name)
                told = (
                    f"{parameter.opts[0]} {value}: give {wanted}" if value is not None and wanted else _one_line(error)
                )
                faults.add(told)

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


def _one_line(error: Any) -> str:
    return " ".join(error.format_message().split())


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
