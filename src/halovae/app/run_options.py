"""How a command that runs a VAE on ranks is to run it, from its flags and their words; its files, checked."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halovae.base import options
from halovae.base.errors import Faults, InputError
from halovae.base.files import check_output

if TYPE_CHECKING:
    from halovae.media import FrameRange
    from halovae.tiles.tile_settings import TileSettings


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every command that runs a VAE on ranks needs to know, by the names of its flags.

    Raises:
        InputError: some of it contradicts the rest.
    """

    model: str | None = None
    ranks: int | None = None
    axis: options.Axis = "auto"
    dtype: str | None = None
    vae_encode_dtype: str | None = None
    """None: as `dtype`."""
    vae_decode_dtype: str | None = None
    device: str | None = None
    mode: str | None = None
    """None: exact, or tile for a VAE that comes tiled."""
    untiled: bool = False
    """Exact mode for a VAE that comes tiled, too."""
    tile_size: tuple[int, int] | None = None
    """Height and width in pixels; None: the VAE's own."""
    tile_overlap: tuple[int, int] | None = None
    vae_use_tiling: bool = False
    """The same as the mode "tile"."""
    vae_patch_parallel_size: int | None = None
    """How many ranks run the VAE; None: all."""

    def __post_init__(self) -> None:
        faults, mode = Faults(), self.mode or ("tile" if self.vae_use_tiling else None)
        with faults.noted():
            check_tiling("--mode", self.mode, self.vae_use_tiling)
        if self.untiled and mode not in (None, "exact"):
            faults.add(f"--untiled is for exact mode, but --mode {mode} is asked for: leave one of them out")
        for flag, pair in (("--tile-size", self.tile_size), ("--tile-overlap", self.tile_overlap)):
            if pair is not None and mode in (None, "exact"):
                faults.add(f"{flag} {pair[0]},{pair[1]}: exact mode has no tiles; add --mode tile, or leave {flag} out")
        if mode == "tile" and self.axis != "auto":
            axis = self.axis if isinstance(self.axis, str) else "x".join(map(str, self.axis))
            faults.add(f"--axis {axis}: tiles are not cut; leave it out, or use --mode exact")
        faults.check()
        object.__setattr__(self, "mode", mode)

    def set_tiles(self, vae: Any) -> None:
        """Give the VAE the sizes that were asked for."""
        if self.tile_size is None and self.tile_overlap is None:
            return
        from halovae.tiles.tile_settings import TileSettings

        tiles, name = TileSettings.of(vae), type(vae).__name__
        if tiles is None:
            raise InputError(f"--tile-size and --tile-overlap: the tiles of {name} can't be set; leave them out")
        size = self.tile_size or tiles.size
        overlap = self.tile_overlap or _in_proportion(tiles, size)
        for one, other in zip(size, overlap, strict=True):
            if one % tiles.ratio or other % tiles.ratio:
                raise InputError(
                    f"tiles of {one} pixels that overlap by {other}: {name} needs multiples of {tiles.ratio}; "
                    "change --tile-size or --tile-overlap"
                )
            if other >= one:
                raise InputError(f"tiles of {one} pixels can't overlap by {other}: give a smaller --tile-overlap")
        asked = dataclasses.replace(tiles, size=size, overlap=overlap)
        vae.__dict__.update(asked.changes(vae))
        if TileSettings.of(vae) != asked:
            raise InputError(
                f"{name} can't have {asked}: its tiles have one setting for both axes, "
                f"or other names for it; it takes {TileSettings.of(vae)}"
            )


@dataclass(frozen=True, kw_only=True)
class VaeJob:
    """What one run of a command that runs a VAE alone shall do."""

    source: Path
    output: Path
    json: Path | None
    frames: FrameRange | None = None
    height: int | None = None
    width: int | None = None
    compare: bool = False
    lossless: bool = False
    report: Path | None = None
    words: tuple[str, ...] = ()
    """The command line."""


def dtype_on(kind: str, asked: str | None = None) -> str:
    """The number format of a run on a kind of device: what was asked for, or what that computes well with."""
    return asked or ("float32" if kind == "cpu" else "bfloat16")


def check_tiling(flag: str, mode: str | None, use_tiling: bool) -> None:
    """Refuse what `--mode` or `--vae-mode` (the flag), and `--vae-use-tiling`, can't ask for together."""
    if use_tiling and mode not in (None, "tile"):
        raise InputError(f"--vae-use-tiling means {flag} tile, but {flag} {mode} is given too: leave one out")


def _in_proportion(tiles: TileSettings, size: tuple[int, int]) -> tuple[int, int]:
    """The VAE's own overlap, as the same share of tiles of another size."""
    shares = zip(size, tiles.overlap, tiles.size, strict=True)
    height, width = (round(one * overlap / own / tiles.ratio) * tiles.ratio for one, overlap, own in shares)
    return height, width


# ---- from the words of flags -----------------------------------------------------------------------------------------


def parse_axis(text: str) -> options.Axis:
    """From the words of `--axis`."""
    if text in ("auto", "height", "width"):
        return text
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if match is None:
        raise InputError(f"--axis {text}: give auto, height, width, or rows and columns such as 2x4")
    return int(match[1]), int(match[2])


def parse_pair(flag: str, text: str, least: int) -> tuple[int, int]:
    """From the words of `--tile-size` or `--tile-overlap`."""
    match = re.fullmatch(r"(\d{1,5}),(\d{1,5})", text)
    if match is None or min(int(match[1]), int(match[2])) < least:
        raise InputError(f"{flag} {text}: give height and width in pixels such as 256,256")
    return int(match[1]), int(match[2])


def parse_counts(words: str) -> tuple[int, ...]:
    """From the words of `plan --ranks`."""
    counts = [int(word) if word.isdecimal() else 0 for word in words.split(",")]
    if not all(1 <= count <= options.MOST_RANKS for count in counts):
        raise InputError(f"--ranks {words}: give numbers from 1 to {options.MOST_RANKS} such as 1,2,4,8")
    return tuple(dict.fromkeys(counts))


def parse_grid(text: str) -> tuple[int, int, int]:
    """From the words of `--grid`: rows, columns and overlap; 0 rows or columns: no lines between them."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})(?:\+(\d{1,5}))?", text)
    if match is None or not (int(match[1]) or int(match[2])):
        raise InputError(f"--grid {text}: give rows and columns from tile to tile such as 192x192, or 192x192+64")
    return int(match[1]), int(match[2]), int(match[3] or 0)


def check_written(json: Path | None, report: Path | None = None) -> None:
    """Refuse places of reports that can't be written."""
    if json is not None:
        check_output(json, (".json",))
    if report is not None:
        from halovae.evaluation.report.page import check_report

        check_report(report)


def check_other(output: Path, source: Path) -> None:
    """Refuse to write what would take the place of what is read."""
    if output.exists() and output.samefile(source):
        raise InputError(f"output {output} is the input: give another name")
