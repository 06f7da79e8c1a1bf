"""The docs' table of VAEs, made from the table that the tests run over.

python tests/family_table.py --write
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from families import FAMILIES, OUT_OF_SCOPE, Family

PAGE = Path(__file__).parent.parent / "docs" / "supported.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->"
PIECES: dict[str, tuple[int, int, bool, list[int], list[int]]] = {
    "qwenimage": (9, 3, False, [1, 1, 1], [1, 4, 4]),
    "wan21": (18, 5, False, [1, 1, 1, 1, 1], [1, 4, 4, 4, 4]),  # The VAE leaves the last frame out.
    "wan22": (13, 4, False, [1, 1, 1, 1], [1, 4, 4, 4]),
    "hunyuan_video_framewise": (33, 9, False, [5, 3, 1], [14, 12, 7]),
    "cogvideox": (17, 5, True, [3, 2], [9, 8]),
    "magvit": (13, 4, False, [1, 1, 1, 1], [1, 4, 4, 4]),
    "mochi": (13, 3, False, [3], [13]),
    "kvae_video": (37, 9, False, [5, 4, 1], [17, 16]),
    "kandinsky6_sr": (33, 9, False, [5, 4], [17, 16]),
    "minimax_h3": (39, 0, False, [2, 5, 5], []),
}
"""Frames and latent frames of a stream, whether their number is told, and frames of each piece of both halves."""
TEMPORAL = {"use_framewise_decoding": True, "tile_sample_min_num_frames": 16, "tile_sample_stride_num_frames": 8}
IN_TILES: dict[str, tuple[int, dict[str, Any], list[int]]] = {
    "minimax_h3": (17, {}, [18, 17, 21]),
    "wan21": (3, {}, [1, 4, 4]),
    "hunyuan_video_framewise": (9, {}, [14, 12, 7]),
    "ltx": (5, TEMPORAL, [10, 8, 15]),
    "cogvideox": (5, {}, [9, 8]),
    "hunyuan_video15": (2, {}, [5]),  # All frames of a tile at once.
}
"""Latent frames of a stream in tiles, settings, and frames of each decoded piece."""
LEFT_OUT = "| not in the table | why |\n|---|---|\n"


def make_table() -> str:
    lines = [
        "| class | ratio (space / time) | encode | decode | streams: encode / decode | tolerance |",
        "|---" * 6 + "|",
    ]
    classes: dict[str, list[Family]] = {}
    for family in FAMILIES.values():
        classes.setdefault(family.model, []).append(family)
    for model, rows in classes.items():
        ratios = ", ".join(dict.fromkeys(f"{space} / {time}" for space, time in (row.ratio for row in rows)))
        halves = [_verdict(rows, half) for half in ("encode", "decode")]
        tolerance = max(row.tolerance for row in rows)
        lines.append(f"| `{model}` | {ratios} | {halves[0]} | {halves[1]} | {_streams(rows)} | {tolerance:.0e} |")
    left_out = "".join(f"| `{name}` | {why} |\n" for name, why in OUT_OF_SCOPE.items())
    return "\n".join(lines) + "\n\n" + LEFT_OUT + left_out


def _verdict(rows: list[Family], half: str) -> str:
    present = [row for row in rows if getattr(row, half)]
    if not present:
        return "-"
    return "exact" if all(getattr(row, f"exact_{half}") for row in present) else "refused"


def _streams(rows: list[Family]) -> str:
    """Latents and frames of the first piece, and of those that follow it."""
    if not any(len(shape) == 5 for row in rows for shape in (row.sample_shape, row.latent_shape)):
        return "-"
    _, _, is_told, *halves = next((PIECES[row.name] for row in rows if row.name in PIECES), (0, 0, False, [0], [0]))
    words: list[str] = []
    for half, pieces in zip(("encode", "decode"), halves, strict=True):
        steps = ", then ".join(map(str, dict.fromkeys(pieces[:2])))
        words.append("-" if _verdict(rows, half) != "exact" else steps if len(pieces) > 1 else "whole")
    for *_, pieces in (IN_TILES[row.name] for row in rows if row.name in IN_TILES and words[1] == "-"):
        words[1] = f"{pieces[0]}, then {pieces[1]} in tiles"
    return " / ".join(words) + (", with `count`" if is_told else "")


def table_in_docs() -> str:
    return PAGE.read_text().split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        print(make_table(), end="")
    else:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + BEGIN + make_table() + END + rest.split(END)[1])
