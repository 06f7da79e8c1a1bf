"""One rank at work: its device, its group, its VAE, the seconds of each stage, and what a user sees meanwhile."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from halovae import comm
from halovae.app import launch
from halovae.app.run_options import RunOptions, dtype_on
from halovae.base import timeline
from halovae.base.errors import HalovaeError, InputError
from halovae.base.memory import PeakMemory
from halovae.base.options import UNTIMED
from halovae.base.options import Half as HalfName
from halovae.calls.dtypes import HalfDtypes
from halovae.calls.target import Target
from halovae.media import models
from halovae.media import vae_limits as fit

T = TypeVar("T")


class Advance(Protocol):
    """Called when so many steps more of a stage are done."""

    def __call__(self, count: int = 1) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A VAE, ready to be used."""

    source: models.VaeSource
    vae: Any
    limits: fit.Limits


@dataclass(kw_only=True)
class Half:
    """What encoding or decoding one clip took on this rank, over all the VAE's calls for it."""

    seconds: float = 0.0
    """Without the choice of a mode, the probe that a first parallel call makes, and reading."""
    read_seconds: float = 0.0
    """Of the clip that is encoded."""
    calls: int = 0
    mode: str = "exact"
    shards: tuple[int, int] = (1, 1)
    """Exact mode."""
    tiles: int = 0
    """Tile mode: how many each call of the VAE has; 0 in exact mode."""
    spread: float = 1.0
    tile_sizes: str = ""
    choice: str = ""
    """Auto mode: which mode was chosen, and why."""
    messages: int = 0
    bytes: int = 0
    wait_seconds: float = 0.0
    peak_memory: int | None = None
    """Bytes: of the accelerator's memory, or of the whole process on a CPU. None: unknown."""

    def add(self, report: Any) -> None:
        """Take in the report of one parallel call."""
        self.seconds -= report.phases.get("probe", 0.0)
        self.mode, self.shards = report.mode, report.shape
        self.tiles, self.spread, self.tile_sizes = report.tiles, report.spread, report.tile_sizes
        self.choice = report.choice
        self.messages += report.messages
        self.bytes += report.bytes
        self.wait_seconds += report.wait_seconds
        if report.peak_memory is not None:
            self.peak_memory = max(self.peak_memory or 0, report.peak_memory)

    def cut(self, ranks: int) -> str:
        """What ran where on so many ranks, in words; nothing for the VAE as it is."""
        if self.mode == "tile":
            idle = max(0, ranks - self.tiles)
            words = f"{self.tiles} {self.tile_sizes}"
        else:
            idle = ranks - self.shards[0] * self.shards[1]
            words = f"cut {self.shards[0]}x{self.shards[1]}" if ranks > 1 else ""
        return words + (f" ({idle} had nothing to do)" if idle else "")

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "shards": list(self.shards)}


@dataclass(kw_only=True)
class Session:
    """One rank of a run."""

    options: RunOptions
    place: launch.Place
    group: comm.Comm
    device: torch.device
    dtype: torch.dtype
    stages: Stages
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    source: models.VaeSource | None = None
    """The VAE, where it was found before it is loaded."""

    @property
    def dtypes(self) -> dict[HalfName, torch.dtype]:
        """Of each half of the VAE."""
        asked: dict[HalfName, str | None] = {
            "encode": self.options.vae_encode_dtype, "decode": self.options.vae_decode_dtype
        }  # fmt: skip
        return {half: self.dtype if name is None else getattr(torch, name) for half, name in asked.items()}

    @property
    def dtype_words(self) -> str:
        names = {half: str(dtype).removeprefix("torch.") for half, dtype in self.dtypes.items()}
        one = len(set(names.values())) == 1
        return names["encode"] if one else ", ".join(f"{half} {name}" for half, name in names.items())

    @property
    def threads(self) -> int:
        """Threads of this rank, for the un-parallel run of a comparison too."""
        return torch.get_num_threads()

    @property
    def is_first(self) -> bool:
        return self.group.rank == 0

    def together(self, name: str, step: Callable[[Advance], T], steps: int | None = None) -> T:
        """Do a stage on every rank, and `agree`; `step` gets what to call after each of `steps`."""
        result, own = None, None
        started = time.perf_counter()
        with self.stages.stage(name, steps) as advance:
            try:
                result = step(advance)
            except HalovaeError as error:
                own = error
        self.seconds[name] = time.perf_counter() - started
        self.agree(own)
        return result  # type: ignore[return-value]  # It is T when `own` is None.

    def load(self) -> Loaded:
        """Load the VAE that `--model` names, and learn what it takes."""

        def step(advance: Callable[[], None]) -> Loaded:
            source = self.source or models.find(self.options.model)
            vae = models.load(source, dtype=torch.promote_types(*self.dtypes.values()), device=self.device)
            if len(set(self.dtypes.values())) > 1:
                HalfDtypes(vae, self.dtypes).cast()
            if self.options.mode == "exact" and not self.options.untiled:
                Target(vae).check_exact("--mode exact", "add --untiled")
            self.options.set_tiles(vae)
            limits = fit.limits_of(vae)
            limits.known_pixels()
            return Loaded(source=source, vae=vae, limits=limits)

        return self.together("load", step)

    def fit(self, loaded: Loaded, sizes: tuple[int, int, int]) -> fit.Fit:
        """How a clip of these frames, height and width goes through the VAE; tells the user when it is padded."""
        found = self.together("fit", lambda advance: loaded.limits.fit(*sizes))
        for note in found.notes:
            self.stages.note(note)
        return found

    @contextmanager
    def parallel(self, vae: Any, **options: Any) -> Iterator[Any]:
        """Within it, `vae` runs on all ranks as the user asked, unless `options` ask otherwise. Yields the handle."""
        asked = self.options
        ways: dict[str, Any] = {
            "mode": asked.mode,
            "untiled": asked.untiled,
            "axis": asked.axis,
            "size": asked.vae_patch_parallel_size,
        }
        from halovae.api.parallelize import parallelize

        with parallelize(vae, options=UNTIMED, **(ways | options)) as handle:
            yield handle

    @contextmanager
    def measured(self, name: str, handle: Any, frames: int) -> Iterator[tuple[Half, Advance, Callable[[], None]]]:
        """Within it, a clip of so many frames is encoded or decoded, by a parallel VAE or, without a handle, on this
        rank alone.

        Yields:
            The account of it, complete at the end; what to call with numbers of frames that are done; and what to call
            after each call of the VAE, which may be more often.
        """
        half = Half()
        self.synchronize()
        # A parallel call measures its own; each measurement begins anew, so that one within the other would spoil it.
        memory = PeakMemory(self.device) if handle is None else None
        started = time.perf_counter()

        known = None if handle is None else handle.last

        def after() -> None:
            nonlocal known
            if handle is None:
                half.calls += 1
            elif handle.last is not known:
                known = handle.last
                half.calls += 1
                half.add(known)

        with self.stages.stage(name, frames, "frames") as advance, torch.inference_mode():
            yield half, advance, after
        self.synchronize()
        half.seconds += time.perf_counter() - started - half.read_seconds
        half.peak_memory = half.peak_memory if memory is None else memory.read()
        self.seconds[name] = half.seconds
        timeline.note(name, started + half.read_seconds)  # Most is read ahead of the VAE's first call.

    def agree(self, error: HalovaeError | None) -> None:
        """Go on where all ranks can. If one has failed, all do, so that none is left waiting. Called on every rank."""
        messages = self.group.all_gather_object(None if error is None else str(error))
        if error is not None:
            raise error
        for message in messages:
            if message is not None:
                raise InputError(message)

    def synchronize(self) -> None:
        """Wait until the device has done what it was told."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


@contextmanager
def session(options: RunOptions, place: launch.Place) -> Iterator[Session]:
    """Join the group and leave it."""
    torch.set_num_threads(launch.threads(place.local_world_size))
    device = _device(options.device, place)
    comm.init_from_env(device.type)
    opened = Session(
        options=options,
        place=place,
        group=comm.world(),
        device=device,
        dtype=getattr(torch, dtype_on(device.type, options.dtype)),
        stages=Stages(speaks=place.rank == 0),
    )
    if device.type == "cpu" and place.local_world_size > launch.cores():
        opened.stages.note(f"{place.local_world_size} ranks share {launch.cores()} cores: slower than one each")
    if options.vae_use_tiling:
        opened.stages.note("--vae-use-tiling: this is --mode tile")
    with _noting_warnings(opened.stages):
        yield opened
    # Not after an exception: leaving may wait for ranks that are gone.
    comm.shutdown()


@contextmanager
def _noting_warnings(stages: Stages) -> Iterator[None]:
    """What the library warns of is told as the command line tells things, once for all ranks."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: stages.note(record.getMessage())
    logger = logging.getLogger("halovae")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def device_kind(asked: str | None) -> str:
    """The kind of device that a run is on: what was asked for, or the accelerator where there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    there = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    kind = asked or there[-1]
    if kind not in there:
        raise InputError(f"--device {kind}: this machine has {' and '.join(there)} (give the kind only)")
    return kind


def _device(asked: str | None, place: launch.Place) -> torch.device:
    kind = device_kind(asked)
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if place.local_world_size > count:
        raise InputError(f"{place.local_world_size} ranks, but only {count} {kind} devices: use --ranks {count}")
    torch.accelerator.set_device_index(place.local_rank)
    return torch.device(kind, place.local_rank)


_CLEAR_LINE = "\x1b[K"


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s", style="progress.data.speed")


class Stages:
    """The stages of a run, one at a time. Of several ranks, one `speaks` to the user."""

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks
        self._shows = speaks and sys.stderr.isatty()
        if self._shows:
            sys.stderr.write(_CLEAR_LINE)

    @contextmanager
    def stage(self, name: str, steps: int | None = None, unit: str = "") -> Iterator[Advance]:
        """Show `name` while in it, how many of `steps` (None: unknown) are done, how many a second, and the time left.

        Yields what to call when steps are done.
        """
        if not self._shows:
            yield lambda count=1: None
            return
        columns = (
            TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), _Rate(),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            # Until the first step is done, a bar that moves says more than one that stays empty.
            task = progress.add_task(name, total=None)

            def advance(count: int = 1) -> None:
                progress.update(task, advance=count, total=steps)

            yield advance

    def note(self, text: str) -> None:
        """Tell the user what else has happened, on a line of its own."""
        if self._speaks:
            sys.stderr.write(f"halovae: note: {text}\n")
