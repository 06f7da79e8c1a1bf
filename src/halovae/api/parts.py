"""Clips that come in parts: sessions, which the caller feeds, and streams, which read an iterator."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from halovae.api.stream import Leaving
from halovae.base.errors import InputError
from halovae.base.options import Half
from halovae.calls.resumed import Held, laid_out
from halovae.calls.time_stages import Position, Stage, TimeStages
from halovae.comm import Start
from halovae.exact.run import first_tensor


@dataclass
class PartialClip:
    """One half's clip, as far as it has come."""

    half: str
    kwargs: dict[str, Any]
    words: str
    """What an agreement calls it."""
    start: Start | None = None
    """Of a stream that has not begun."""
    count: int | None = None
    """Of all frames, where that is known."""
    stages: TimeStages | None = None
    """None where all frames are made at once."""
    is_opened: bool = False
    place: Position = field(default_factory=Position)
    held: Held = field(default_factory=Held)
    tail: Tensor | None = None
    """The last frames that were given: later steps may need them again."""
    short: int | None = None
    """Length of the clip that stands for all of it, where `count` is known."""
    given: int = 0
    is_session: bool = False
    pieces: list[float] = field(default_factory=list[float])
    """Seconds to each piece."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def bytes(self) -> int:
        """Of memory that is held between two parts, on this rank."""
        return self.held.bytes + (0 if self.tail is None else self.tail.nbytes)

    def opened(self, stages: TimeStages | None, short: int | None) -> None:
        """Know the steps of it."""
        self.stages, self.short, self.is_opened, self.start = stages, short, True, None
        self.place = stages.start if stages else Position()

    def check(self, frames: Tensor | None, ends: bool = False) -> None:
        """Check that frames go on with the clip.

        Raises:
            InputError: they are of another size, there are none in the whole clip, or not as many as there should be.
        """
        if frames is not None and not isinstance(frames, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"{self.words} got a {type(frames).__name__}: {_WANTED}")
        if frames is not None and (frames.ndim != 5 or 0 in frames.shape):
            raise InputError(f"{self.words} got a tensor of shape {tuple(frames.shape)}: {_WANTED}")
        if frames is not None and self.tail is not None and kind_of(frames) != kind_of(self.tail):
            raise InputError(self.odd(frames, self.tail))
        total = self.given + (0 if frames is None else frames.shape[2])
        if ends and not total:
            raise InputError(f"{self.words} got no frames")
        if self.count is not None and (total > self.count or (ends and total < self.count)):
            raise InputError(f"{self.words} got {total} frames, but count is {self.count}")

    def odd(self, frames: Tensor, before: Tensor) -> str:
        """That frames are of another size."""
        return f"{self.words} got frames of {kind_of(frames)} after {kind_of(before)}: one clip has one size"

    def _real(self, frames: Tensor | None) -> Tensor:
        known = [tensor for tensor in (self.tail, frames) if tensor is not None]
        return torch.cat(known, 2) if len(known) > 1 else known[0]

    def laid_out(self, stage: Stage, frames: Tensor | None) -> Tensor:
        """The clip that the VAE's method gets for a stage."""
        return laid_out(stage, self._real(frames))

    def went_on(self, stage: Stage, place: Position, held: Held, frames: Tensor | None) -> None:
        """A stage has been run on all ranks."""
        real = self._real(frames)
        self.tail = real[:, :, -stage.keeps :].clone() if stage.run else real
        self.place, self.held = place, held
        self.given += 0 if frames is None else frames.shape[2]


_WANTED = "give tensors (batch, channels, frames, height, width), of at least one frame"


def kind_of(frames: Tensor) -> str:
    """What all frames of a clip have in common."""
    batch, channels, _, height, width = frames.shape
    return f"{batch} x {channels} x {height} x {width} {frames.dtype} on {frames.device.type}"


class Runs(Protocol):
    """What a handle does for clips."""

    def run_part(
        self, clip: PartialClip, frames: Tensor | None, *, ends: bool = False, goes_on: bool = True,
        problem: BaseException | None = None,
    ) -> Any:  # fmt: skip
        """One call, on all ranks: open the clip with its first frames, or run its next stage.

        Args:
            clip: goes on by it.
            frames: new ones; None: there are none.
            ends: whether the clip ends with them, or stops there for a while.
            goes_on: whether this rank wants more.
            problem: is raised on all ranks.

        Returns:
            What the half returns for the frames that are final, None where there are none; `CLOSED` where a rank
            wants no more.
        """
        ...

    def forgo(self, start: Start, leaving: Leaving) -> None:
        """This rank will not begin this stream. Waits for nobody."""
        ...


CLOSED = object()


class ClipSession:
    """A clip that goes on from call to call: the VAE's causal caches are kept between them, sharded.

    Made by `Handle.session`. Every rank makes the same calls. Calls of other sessions and of the VAE itself may come in
    between.
    """

    def __init__(self, handle: Runs, name: str, end: Any) -> None:
        self._handle, self._name, self._end = handle, name, end
        self._clips: dict[str, PartialClip] = {}
        self._is_open = True

    def decode(self, latents: Tensor, **kwargs: Any) -> Any:
        """The next frames of the video.

        Args:
            latents: that come next, `(batch, channels, frames, height, width)`; any number of frames with which one
                call could go on. The same on every rank.
            kwargs: as for the VAE's `decode`, the same in each call.

        Returns:
            What the VAE's `decode` returns, for the new frames; None where none is final so far. Joined in time, the
            frames of all calls are those of one call with all latents.

        Raises:
            InputError: the latents are of another size than before, or the VAE can't go on so.
        """
        return self._run("decode", latents, kwargs)

    def encode(self, frames: Tensor, **kwargs: Any) -> Any:
        """The next latents of the video, as `decode` gives its next frames.

        Args:
            frames: that come next, `(batch, channels, frames, height, width)`.
            kwargs: as for the VAE's `encode`.
        """
        return self._run("encode", frames, kwargs)

    @property
    def state_bytes(self) -> int:
        """Memory that this rank holds between two calls: caches of its shard, and the last frames that were given."""
        return sum(clip.bytes for clip in self._clips.values())

    def close(self) -> None:
        """Give up what is kept. A second time does nothing."""
        self._is_open = False
        self._clips.clear()
        self._end(self)

    def __enter__(self) -> ClipSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, half: str, frames: Tensor, kwargs: dict[str, Any]) -> Any:
        if not self._is_open:
            raise InputError(f"{self._name} is closed: open another one")
        clip = self._clips.get(half) or PartialClip(half, kwargs, f"{half} of {self._name}", is_session=True)
        if not clip.is_opened:
            self._handle.run_part(clip, frames)
        result = self._handle.run_part(clip, frames, ends=True)
        self._clips[half] = clip
        return result


class Parts(Iterator[Any]):
    """What a half makes of a clip that comes from an iterator, as it comes. Made by `Handle.encode_stream` and, of an
    iterable of latents, by `Handle.decode_stream`.

    Nothing is read or computed ahead. Every rank takes its own to the end, or closes it; who leaves a loop early closes
    it too. Closing waits until every rank has asked for its next piece or has closed; before the first one is asked
    for, it waits for nobody. An exception that leaves its `with` block is a failure: other ranks raise
    `RankFailedError` for it.
    """

    def __init__(self, handle: Runs, half: Half, frames: Iterable[Tensor], clip: PartialClip) -> None:
        self._handle, self._half, self._clip = handle, half, clip
        self._is_begun = self._has_ended = self._is_all_read = False
        self._source, self._read = iter(frames), list[Tensor]()  # What it fails by is told to the others at the end.

    @property
    def is_open(self) -> bool:
        """Whether it has begun and not ended."""
        return self._is_begun and not self._has_ended

    def __iter__(self) -> Parts:
        return self

    def __next__(self) -> Any:
        self._is_begun = True
        while not self._has_ended:
            try:
                result = self._step()
            except BaseException as error:
                self._forgo(Leaving.by(error))
                raise
            if result is CLOSED:
                self._finish()
            elif result is not None:
                return first_tensor(result) if self._half == "decode" else result
        raise StopIteration

    def _step(self) -> Any:
        clip, problem, frames = self._clip, None, None
        need = 1
        if clip.is_opened:
            found = clip.stages and clip.stages.next_part(clip.place, clip.short)
            need = found[0] if found else sys.maxsize
        try:
            self._fill(need)
        except BaseException as error:
            problem = error
        else:
            if not clip.is_opened:  # The frames are not used up.
                return self._handle.run_part(clip, self._read[0] if self._read else None, ends=not self._read)
            frames = self._taken(need)
        ends = self._is_all_read and (frames is None or frames.shape[2] < need)
        result = self._handle.run_part(clip, frames, ends=ends, problem=problem)
        if ends:
            self._finish()
        return result

    def _fill(self, need: int) -> None:
        """Read so many frames, if there are."""
        while not self._is_all_read and sum(tensor.shape[2] for tensor in self._read) < need:
            try:
                frames = next(self._source)
            except StopIteration:
                self._is_all_read = True
            else:
                self._clip.check(frames)
                if self._read and kind_of(frames) != kind_of(self._read[0]):
                    raise InputError(self._clip.odd(frames, self._read[0]))
                self._read.append(frames)

    def _taken(self, need: int) -> Tensor | None:
        """So many frames, or all that are left."""
        if not self._read:
            return None
        joined = self._read[0] if len(self._read) == 1 else torch.cat(self._read, 2)
        rest = joined[:, :, need:]
        self._read = [rest] if rest.shape[2] else []
        return joined[:, :, :need]

    def _finish(self) -> None:
        self._has_ended, self._is_all_read = True, True
        self._read.clear()
        self._clip = PartialClip(self._clip.half, {}, self._clip.words)
        self._source = iter(())

    def close(self) -> None:
        """End it on all ranks, after the piece that is under way. A second time does nothing."""
        if self.is_open:
            try:
                self._handle.run_part(self._clip, None, goes_on=False)
            finally:
                self._finish()
        else:
            self._forgo(Leaving())

    def _forgo(self, leaving: Leaving) -> None:
        """End it here; the others learn of it if it has not begun."""
        start = self._clip.start
        self._finish()
        if start:
            self._handle.forgo(start, leaving)

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, GeneratorExit):
            self.close()
        elif self.is_open:
            with suppress(Exception):  # What the block failed by is raised on; the other ranks get it here.
                self._handle.run_part(self._clip, None, problem=error)
            self._finish()
        else:
            self._forgo(Leaving.by(error))

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():
            with suppress(Exception):
                self.close() if self.is_open else self._forgo(Leaving(is_closed=False))
