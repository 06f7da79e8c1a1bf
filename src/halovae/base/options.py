"""What a caller may choose, checked once, and what a call reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from halovae.base.errors import InputError
from halovae.base.geometry import Extent

Axis = str | tuple[int, int]
Gather = str | Mapping[str, str]
"""One of `GATHERS` for both halves, or {"encode": ..., "decode": ...}; a half left out has "all"."""

MOST_RANKS = 1024
"""For which a plan is made at the most."""
HALVES = ("encode", "decode")
MODES = ("exact", "tile", "auto")
AXES = ("auto", "height", "width")
GATHERS = ("all", "first", "shard")
TILES = ("own", "fit")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a VAE is run on the ranks of a group."""

    mode: str | None = None
    """"exact": spatial shards with halo exchange; the un-tiled result. "tile": the VAE's own tiles, spread. "auto":
    exact where the link is fast enough for it, else tile. None: exact, or tile for a VAE that comes tiled."""
    axis: Axis = "auto"
    """"auto", "height", "width", or (rows, columns) of the grid of shards."""
    size: int | None = None
    """Use the first `size` ranks only; the others wait and share the result. None: all."""
    gather: Gather = "all"
    """Who holds the whole output: "all" ranks, the "first", or none ("shard": each rank its own part); or a mapping
    with one of them for each half."""
    verify: bool = True
    """Compare a small probe with the un-parallel VAE at the first use of each half."""

    tiles: str = "own"
    """"own": tiles of the VAE's settings; "fit": smaller ones where some rank would have none."""
    timeout: float = 60.0
    """Seconds without a sign of life after which a rank counts as stopped."""
    frames_per_call: int | str = "auto"
    """Latent frames in one call of a network that walks through time (exact mode); "auto": as many as fill an
    accelerator, and on a CPU as few as the VAE itself takes."""

    graphs: bool | str = "auto"
    """Record calls of a kind that comes again, and replay them (exact mode, on accelerators that can); "auto": where
    that is faster, and most of the free memory stays free."""

    def __post_init__(self) -> None:
        _one_of("tiles", self.tiles, TILES)
        if self.mode is not None:
            _one_of("mode", self.mode, MODES)
        _check_gather(self.gather)
        if isinstance(self.axis, str):
            _one_of("axis", self.axis, AXES, "a (rows, columns) pair")
        elif not isinstance(self.axis, tuple) or [type(n) is int and n > 0 for n in self.axis] != [True, True]:
            raise InputError(f"axis is {self.axis!r}: allowed are {', '.join(AXES)} or a pair of whole numbers from 1")
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            raise InputError(f"size is {self.size!r}: give the number of ranks to use, at least 1, or None for all")
        _check_frames(self.frames_per_call)
        if type(self.graphs) is not bool and self.graphs != "auto":
            raise InputError(f"graphs is {self.graphs!r}: give True, False or 'auto'")
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, (int, float)) or not 1 <= self.timeout < 1e6:
            raise InputError(f"timeout is {self.timeout!r}: give seconds, from 1")

    @property
    def cut(self) -> str:
        """How the picture is cut, in words."""
        exact = f"axis {self.axis}, verify {self.verify}"
        tiles = f"{self.tiles} tiles"
        return {"tile": tiles, "auto": f"{exact}, {tiles}"}.get(self.mode or "", exact)

    def check_ranks(self, ranks: int) -> None:
        """Check the choices against the number of ranks in the group.

        Raises:
            InputError: more ranks are asked for than there are.
        """
        if self.size is not None and self.size > ranks:
            raise InputError(f"size is {self.size} but the group has {ranks} ranks: use at most {ranks}")
        usable = self.size or ranks
        if not isinstance(self.axis, str) and self.axis[0] * self.axis[1] > usable:
            rows, cols = self.axis
            raise InputError(
                f"axis asks for {rows} x {cols} = {rows * cols} shards but {usable} ranks are in use: "
                f"choose rows * columns up to {usable}, or 'auto'"
            )


def gather_of(gather: Gather, half: str) -> str:
    """Who holds the output of one half."""
    return gather if isinstance(gather, str) else gather.get(half, "all")


def _check_gather(gather: Gather) -> None:
    if not isinstance(gather, (str, Mapping)):
        raise InputError(f"gather is {gather!r}: give {', '.join(GATHERS)}, or one of them for each half")
    if not isinstance(gather, str):
        for half in gather:
            _one_of("a half of gather", half, HALVES)
    for half in HALVES:
        _one_of("gather", gather_of(gather, half), GATHERS)


def _check_frames(frames: int | str) -> None:
    if frames != "auto" and (type(frames) is not int or frames < 1):
        raise InputError(f"frames_per_call is {frames!r}: give a number of latent frames, at least 1, or 'auto'")


def checked_halves(halves: Sequence[str]) -> tuple[str, ...]:
    """`halves` in the order of `HALVES`, each once.

    Raises:
        InputError: something else than "encode" and "decode", or nothing.
    """
    if not halves or isinstance(halves, str) or not set(halves) <= set(HALVES):
        raise InputError(f"halves is {halves!r}: give a list of 'encode', 'decode' or both")
    return tuple(half for half in HALVES if half in halves)


def _one_of(name: str, value: object, allowed: tuple[str, ...], also: str = "") -> None:
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise InputError(f"{name} is {value!r}: allowed are {choices}{' or ' + also if also else ''}")


@dataclass(frozen=True, kw_only=True)
class CallReport:
    """What one encode or decode did on this rank."""

    half: str
    """"encode" or "decode"."""
    mode: str
    """"exact" or "tile": how it was run."""
    reference: str
    """What the result is that of: the "un-tiled" VAE, or the VAE's own "tiles"."""
    seconds: float
    phases: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds of attempts that ran out of memory (auto mode), agreement, choice (auto mode), probe (exact mode, first
    call only), network and gather."""
    messages: int = 0
    """Messages this rank sent."""
    bytes: int = 0
    """Bytes this rank sent."""
    wait_seconds: float = 0.0
    """Seconds this rank spent in exchanges."""
    peak_memory: int | None = None
    """Most bytes in use during the call: of the accelerator's memory, or of the process on a CPU. None: unknown."""
    extents: dict[str, Extent] = field(default_factory=dict[str, Extent])
    """Rows and columns of the output that this rank computed, as {"height": (low, high), "width": (low, high)}."""
    shape: tuple[int, int] = (1, 1)
    """Exact mode: rows and columns of the grid of shards."""
    bounds: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """Exact mode: where the rows and the columns of the input were cut."""
    steps: tuple[int, ...] = ()
    """Exact mode: steps in time in each call of the network, where several go in one; else nothing."""
    replayed: bool = False
    """Exact mode: whether a recording of an earlier call was replayed."""
    kept_memory: int = 0
    """Exact mode: bytes that recordings keep on the accelerator until the next call."""
    tiles: int = 0
    """Tile mode: how many tiles there were, each with all its frames."""
    spread: float = 1.0
    """Tile mode: largest over mean load of the ranks."""
    tile_sizes: str = ""
    """Tile mode: sizes and overlaps."""
    choice: str = ""
    """Auto mode: what was chosen, and why; after memory has run out, how it is run since."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows, cols = self.shape
        cut = f"{self.tiles} tiles (spread {self.spread:.2f})" if self.tiles else f"{rows} x {cols} shards"
        memory = "" if self.peak_memory is None else f", peak {self.peak_memory / 2**20:.0f} MiB"
        return (
            f"{self.half} {self.mode} on {cut}: {self.seconds:.3f} s, {self.messages} messages, "
            f"{self.bytes / 2**20:.2f} MiB sent, {self.wait_seconds:.3f} s in exchanges{memory}, "
            f"reference: {self.reference}"
        )
