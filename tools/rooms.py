"""The rooms of the package: what each is, how long it is, and which rooms it imports.

    python tools/rooms.py            print them
    python tools/rooms.py --write    put them into docs/internals/design.md, and their picture beside it

A room is a folder or a module at the top of src/halovae. Tests read the order of the rooms here as well.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "halovae"
PAGE = ROOT / "docs" / "internals" / "design.md"
PICTURE = ROOT / "docs" / "internals" / "rooms.svg"
BEGIN, END = "<!-- rooms: begin -->\n", "<!-- rooms: end -->"

LAYERS = [
    {"base"}, {"comm"}, {"kernels"}, {"exact"}, {"calls"}, {"tiles"}, {"predict"}, {"api"}, {"media"}, {"evaluation"},
    {"pipelines"}, {"app"}, {"datasets", "serve"}, {"__init__"}, {"cli"}, {"__main__"},
]  # fmt: skip
"""From the lowest to the highest. A room may import rooms of its own layer and of lower ones."""

MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def layer(module: str) -> int:
    """Number of the layer that a module's room is in."""
    room = module.split(".")[0]
    found = [number for number, rooms in enumerate(LAYERS) if room in rooms]
    assert len(found) == 1, f"{room} is in {len(found)} layers: put it into one of LAYERS in {__file__}"
    return found[0]


@functools.cache
def tree(path: Path) -> ast.Module:
    """A module as it is written."""
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> set[str]:
    """Full names of imported modules, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


def own_imports(path: Path) -> set[str]:
    """Names of this package's modules that are imported, without the package's."""
    names = {name.removeprefix("halovae.") for name in imports(path) if name.startswith("halovae.")}
    return {name for name in names if name in MODULES or name.split(".")[0] in MODULES}


def rooms() -> list[str]:
    """From the lowest layer to the highest; the package's own two files are none."""
    found = {name.split(".")[0] for name in MODULES} - {"__init__", "__main__"}
    return sorted(found, key=lambda room: (layer(room), room))


@functools.cache
def arrows(room: str) -> list[str]:
    """The rooms that a room imports."""
    used = {other.split(".")[0] for name in _modules_of(room) for other in own_imports(MODULES[name])}
    return [other for other in rooms() if other in used - {room}]


@functools.cache
def height(room: str) -> int:
    """How many rooms stand below it, one on the other."""
    return max((height(other) + 1 for other in arrows(room) if layer(other) < layer(room)), default=0)


def lines(room: str) -> int:
    return sum(len(MODULES[name].read_text().splitlines()) for name in _modules_of(room))


def sentence(room: str) -> str:
    """What a room is, in the first words of its docstring."""
    said = ast.get_docstring(tree(MODULES[room])) or ""
    return " ".join(said.split("\n\n")[0].split())


def table() -> str:
    """For the docs, with lines in hundreds."""
    head = ["| room | lines | imports | what it is |", "|---|---|---|---|"]
    rows = [f"| `{r}` | {_hundreds(r)} | {', '.join(arrows(r)) or '-'} | {sentence(r)} |" for r in rooms()]
    return "\n".join([*head, *rows]) + "\n"


def picture() -> str:
    """As an SVG: a box for each room, above all those that it imports from lower layers."""
    width, shapes, bottom = 880, list[str](), 10
    heights = {room: height(room) for room in rooms()}
    for level in reversed(range(max(heights.values()) + 1)):
        top, left, boxes = bottom + 10, 20, list[str]()
        band = [room for room in rooms() if heights[room] == level]
        for room in band:
            wide = max(850 // len(band) - 10, 9 * max(len(room), 9) + 20)
            if left + wide > width - 20:
                left, top = 20, top + 56
            title, below = room, f"{_hundreds(room)} lines"
            if len(band) < 4:
                title = f'{room} <tspan class="small">{below}</tspan>'
                below = escape(textwrap.shorten(sentence(room), wide // 7, placeholder=" ..."))
            boxes += [
                f'<rect class="room" x="{left}" y="{top}" width="{wide}" height="46" rx="5"/>',
                f'<text x="{left + 10}" y="{top + 20}">{title}</text>',
                f'<text x="{left + 10}" y="{top + 37}" class="small">{below}</text>',
            ]
            left += wide + 10
        shapes += [f'<rect class="layer" x="10" y="{bottom}" width="860" height="{top + 56 - bottom}"/>', *boxes]
        bottom = top + 64
    inside = textwrap.indent("\n".join(shapes), "  ")
    told = "The rooms of the package. Each stands above those that it imports from lower layers."
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 2}" font-family="system-ui, sans-serif"
  font-size="14" role="img" aria-label="{told}">
  <style>
    .page {{ fill: #ffffff }} .layer {{ fill: #eef3fb }} .room {{ fill: #ffffff; stroke: #4a6fa5 }}
    text {{ fill: #222222 }} .small {{ font-size: 12px; fill: #555555 }}
  </style>
  <rect class="page" width="{width}" height="{bottom + 2}"/>
{inside}
</svg>
"""


def is_current(shown: str, made: str) -> bool:
    """Whether a page shows what is made now. Lines may have grown or shrunk by a few hundreds since."""
    number = re.compile(r"\d+")
    pairs = zip(number.findall(shown), number.findall(made), strict=False)
    near = all(abs(int(one) - int(other)) <= max(300, int(other) // 4) for one, other in pairs)
    return near and number.sub("", shown) == number.sub("", made)


def shown_table() -> str:
    return PAGE.read_text().split(BEGIN)[1].split(END)[0]


def _modules_of(room: str) -> list[str]:
    return [name for name in MODULES if name.split(".")[0] == room]


def _hundreds(room: str) -> int:
    return max(100, round(lines(room), -2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table and the picture into the docs")
    if parser.parse_args().write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1])
        PICTURE.write_text(picture())
        return
    for room in rooms():
        print(f"{layer(room) + 1}  {room:<16}{lines(room):>6}  {' '.join(arrows(room))}")
    upward = [(room, other) for room in rooms() for other in arrows(room) if layer(other) > layer(room)]
    count = sum(len(arrows(room)) for room in rooms())
    print(f"{len(rooms())} rooms, {sum(map(lines, rooms()))} lines, {count} arrows")
    print(f"upward: {', '.join(f'{room} to {other}' for room, other in upward) or 'none'}")


if __name__ == "__main__":
    main()
