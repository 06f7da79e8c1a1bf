"""What a caller may choose, checked once, and what a call reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

from halovae.base.errors import InputError, counted
from halovae.base.geometry import Extent

Half = Literal["encode", "decode"]
Mode = Literal["exact", "tile", "auto"]
Axis = Literal["auto", "height", "width"] | tuple[int, int]
Holders = Literal["all", "first", "shard"]
Gather = Holders | Mapping[Half, Holders]
"""Of both halves, or {"encode": ..., "decode": ...}; a half left out has "all"."""
Tiles = Literal["own", "fit"]

MOST_RANKS = 1024
"""For which a plan is made at the most."""
HALVES: tuple[Half, ...] = get_args(Half)
MODES: tuple[Mode, ...] = get_args(Mode)
NETWORKS = {"encode": "encoder", "decode": "decoder"}
"""Name of the network that each half calls."""
AXES = ("auto", "height", "width")
GATHERS: tuple[Holders, ...] = get_args(Holders)
TILES: tuple[Tiles, ...] = get_args(Tiles)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Rare choices of `parallelize` and `optimize`: most callers need none of them.

    Raises:
        InputError: a value is not one of those that are allowed.

    Example:
        >>> halovae.parallelize(pipe, options=halovae.Options(graphs=False, timeout=600))
    """

    frames_per_call: int | Literal["auto"] = "auto"
    """Latent frames that a VAE which walks through time takes in one call of its network (exact mode). More frames mean
    fewer and larger messages and kernels, and more memory. "auto": as many as fill an accelerator; on a CPU as few as
    the VAE itself takes. 32 at the most. 1: always as the VAE itself."""
    graphs: bool | Literal["auto"] = "auto"
    """Record the second of two calls of the same kind, and replay that from the third on (exact mode where each rank
    has a shard, on accelerators with CUDA graphs or the like; elsewhere nothing changes). The replay leaves Python out,
    and keeps the memory of a call. Four kinds are kept, and given up for a call that is known to lack memory. "auto":
    where the replay is faster, all that is kept is at most a quarter of what is free, and no hooks hang on the VAE,
    since these do nothing in a replay. True: always."""
    alone: bool | Literal["auto"] = "auto"
    """Let each rank that gets the result run the whole picture by itself where that is faster than shards: a picture
    may be too small for its ranks (exact mode, calls of encode and decode that gather the result, where `axis` and
    `size` are left open). "auto": the third call of a kind tries both ways if shards are small and take less than 0.5
    s, and the faster one is kept, on disk too. So later results may differ by rounding from the first three. There is
    no trial with `same_bits`, with torch's deterministic algorithms, with hooks on the VAE, or if one rank has too
    little memory for all. True: alone wherever that can be. False: always on shards."""
    tiles: Tiles = "own"
    """Tile mode. "own": the sizes that the VAE is set to. "fit": smaller ones where some rank would have no tile."""
    same_bits: bool = False
    """Tile mode. Run tiles one by one, so that the result is bit for bit that of the VAE alone on this device, also
    where several in one call of the network are faster: on accelerators, when they are at least 1.1 times as fast and
    differ by rounding alone. On CPUs tiles always run one by one."""
    sessions: int = 8
    """How many sessions of the handle may be open at once: each keeps memory between its calls."""
    timeout: float = 60.0
    """Seconds without a sign of life after which a rank counts as stopped. A rank that is slow gives signs."""

    def __post_init__(self) -> None:
        _one_of("tiles", self.tiles, TILES)
        frames, timeout = self.frames_per_call, self.timeout
        is_count = frames == "auto" or (type(frames) is int and frames >= 1)
        _check("frames_per_call", frames, is_count, "a number of latent frames, at least 1, or 'auto'")
        for name in ("graphs", "alone"):
            value = getattr(self, name)
            _check(name, value, type(value) is bool or value == "auto", "True, False or 'auto'")
        _check_switches(self, "same_bits")
        is_count = type(self.sessions) is int and self.sessions >= 1
        _check("sessions", self.sessions, is_count, "a whole number, at least 1")
        is_number = isinstance(timeout, (int, float)) and type(timeout) is not bool  # pyright: ignore[reportUnnecessaryIsInstance]
        _check("timeout", timeout, is_number and 1 <= timeout < 1e6, "seconds, from 1")


@dataclass(frozen=True, kw_only=True)
class AllOptions(Options):
    """All that a caller may choose: the rare options, and those that `parallelize` has by name."""

    mode: Mode | None = None
    untiled: bool = False
    axis: Axis = "auto"
    size: int | None = None
    gather: Gather = "all"
    verify: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode is not None:
            _one_of("mode", self.mode, MODES)
        _check_switches(self, "untiled", "verify")
        if self.untiled and self.mode not in (None, "exact"):
            raise InputError(f"untiled=True is for exact mode, but mode is {self.mode!r}: leave one of them out")
        _check_gather(self.gather)
        if isinstance(self.axis, str):
            _one_of("axis", self.axis, AXES, "a (rows, columns) pair")
        elif not isinstance(self.axis, tuple) or [type(n) is int and n > 0 for n in self.axis] != [True, True]:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"axis is {self.axis!r}: allowed are {', '.join(AXES)} or a pair of whole numbers from 1")
        is_count = self.size is None or (type(self.size) is int and self.size >= 1)
        _check("size", self.size, is_count, "the number of ranks to use, at least 1, or None for all")

    def check_ranks(self, ranks: int) -> None:
        """Check the choices against the number of ranks in the group."""
        if self.size is not None and self.size > ranks:
            raise InputError(f"size is {self.size} but the group has {counted(ranks, 'rank')}: use at most {ranks}")
        usable = self.size or ranks
        if not isinstance(self.axis, str) and self.axis[0] * self.axis[1] > usable:
            rows, cols = self.axis
            raise InputError(
                f"axis asks for {rows} x {cols} = {rows * cols} shards but the VAE runs on {counted(usable, 'rank')}: "
                f"choose rows * columns up to {usable}, or 'auto'"
            )


def gather_of(gather: Gather | str, half: str) -> str:
    """Who holds the output of one half."""
    return gather if isinstance(gather, str) else cast("Mapping[str, str]", gather).get(half, "all")


def _check_gather(gather: Gather) -> None:
    _check("gather", gather, isinstance(gather, (str, Mapping)), f"{', '.join(GATHERS)}, or one of them for each half")
    if not isinstance(gather, str):
        for half in gather:
            _one_of("a half of gather", half, HALVES)
    for half in HALVES:
        _one_of("gather", gather_of(gather, half), GATHERS)


def checked_halves(halves: Sequence[Half]) -> tuple[Half, ...]:
    """`halves` in the order of `HALVES`, each once.

    Raises:
        InputError: something else than "encode" and "decode", or nothing.
    """
    if not halves or isinstance(halves, str) or not set(halves) <= set(HALVES):
        raise InputError(f"halves is {halves!r}: give a list of 'encode', 'decode' or both")
    return tuple(half for half in HALVES if half in halves)


def _check(name: str, value: object, is_right: bool, wanted: str) -> None:
    if not is_right:
        raise InputError(f"{name} is {value!r}: give {wanted}")


def _check_switches(options: Options, *names: str) -> None:
    for name in names:
        _check(name, getattr(options, name), type(getattr(options, name)) is bool, "True or False")


def _one_of(name: str, value: object, allowed: tuple[str, ...], also: str = "") -> None:
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise InputError(f"{name} is {value!r}: allowed are {choices}{' or ' + also if also else ''}")


UNTIMED = Options(alone=False)
"""Of what writes files: the same settings and seed give the same bytes, whatever times were measured before."""


@dataclass(frozen=True, kw_only=True)
class CallReport:
    """What one encode or decode did on this rank."""

    half: Half
    """"encode" or "decode"."""
    mode: Literal["exact", "tile"]
    """"exact" or "tile": how it was run."""
    reference: Literal["un-tiled", "tiles"]
    """What the result is that of: the "un-tiled" VAE, or the VAE's own "tiles"."""
    seconds: float
    phases: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds of attempts that ran out of memory or were refused (auto mode), agreement, probe (exact mode, first
    call only), network, gather, and of the trial whether ranks are faster alone (exact mode, third call only)."""
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
    alone: str = ""
    """Exact mode: why each rank that gets the result ran the whole picture by itself: the time of such a call, and that
    on shards. Nothing where it did not."""
    replayed: bool = False
    """Exact mode: whether a recording of an earlier call was replayed."""
    recording: str = ""
    """Exact mode: what was replayed: graphs, exchanges with other ranks, and why these are not in the graphs."""
    kept_memory: int = 0
    """Exact mode: bytes that recordings keep on the accelerator until the next call."""
    tiles: int = 0
    """Tile mode: how many tiles there were, each with all its frames."""
    spread: float = 1.0
    """Tile mode: largest over mean load of the ranks."""
    tile_sizes: str = ""
    """Tile mode: sizes and overlaps."""
    tiles_per_call: int = 1
    """Tile mode: how many tiles went in one call of the network on this rank, at the most."""
    same_bits: bool = False
    """Tile mode: whether this rank's tiles are bit for bit those of the VAE alone. Exact mode says nothing by it."""
    pieces: int = 0
    """Of a stream: how many pieces it has given; 1 where the VAE makes all frames at once. 0: it was no stream."""
    first_seconds: float = 0.0
    """Of a stream: seconds to its first piece."""
    choice: str = ""
    """Auto mode: what was chosen, and why; after memory has run out, how it is run since."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows, cols = self.shape
        together = f", {self.tiles_per_call} in one call" if self.tiles_per_call > 1 else ""
        tiles = f"{counted(self.tiles, 'tile')} (spread {self.spread:.2f}{together})"
        cut = tiles if self.tiles else f"{rows} x {cols} shard{'s' * (rows * cols != 1)}"
        alone = f" (each rank alone: {self.alone})" if self.alone else ""
        memory = "" if self.peak_memory is None else f", peak {self.peak_memory / 2**20:.0f} MiB"
        replayed = f", replayed: {self.recording}" if self.replayed else ""
        probe = self.phases.get("probe", 0.0)
        probed = f" (probe {probe:.3f})" if probe else ""
        return (
            f"{self.half} {self.mode} on {cut}{alone}: {self.seconds:.3f} s{probed}, {self.messages} messages, "
            f"{self.bytes / 2**20:.2f} MiB sent, {self.wait_seconds:.3f} s in exchanges{memory}{replayed}, "
            f"reference: {self.reference}"
        )
