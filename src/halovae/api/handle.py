"""The handle of a VAE that is parallelized or optimized: it stands in for encode and decode, and opens streams."""

from __future__ import annotations

import functools
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from halovae.api.caller import Caller
from halovae.api.engine import Ran, StreamClosed
from halovae.api.parts import CLOSED, ClipSession, PartialClip, Parts
from halovae.api.stream import Give, Leaving, Stream
from halovae.base.compiled import never_compiled
from halovae.base.errors import InputError, failed_elsewhere
from halovae.base.forks import owned_here
from halovae.base.memory import is_shortage
from halovae.base.options import AllOptions, Half, Options, gather_of
from halovae.base.trees import map_tensors, on_meta, pictures_in, tensors_in
from halovae.calls.dtypes import HalfDtypes
from halovae.calls.randomness import rewound_by_failure
from halovae.calls.state import undone_by_failure
from halovae.calls.target import Target
from halovae.comm import Comm, Forgone, SoloComm, Start
from halovae.comm.agreement import together
from halovae.kernels.gpu.ready import get_ready
from halovae.kernels.kept import Kept

T = TypeVar("T")
LOG = logging.getLogger("halovae")


class Handle(Caller):
    """A parallelized or optimized VAE. Made by `parallelize` and `optimize`; `print` it to see how the VAE runs.

    Attributes:
        last: what the last call did on this rank, or None before the first.
    """

    def __init__(self, target: Target, comm: Comm, options: AllOptions, dtypes: HalfDtypes) -> None:
        super().__init__(target, comm, options, dtypes)
        self._lock = threading.RLock()
        self._stream: Callable[[], Stream | None] = _no_stream
        """The one that is open."""
        self._opened = 0
        self._start: Start = (0, 0)
        self._sessions: weakref.WeakSet[ClipSession] = weakref.WeakSet()
        self._halves: set[str] = set(target.originals)
        self._running = False
        for half in target.originals:
            target.replace(half, never_compiled(functools.partial(self._call, half)), self)
        try:
            dtypes.cast()
        except BaseException:  # The device has no memory for it.
            self.restore()
            raise
        self._warn_of_tiles(self._mode)
        if (weight := next(target.vae.parameters(), None)) is not None:
            get_ready(weight.device)
        owned_here(self, Handle._disown)

    def restore(self) -> None:
        """Give the VAE its own encode and decode back. Waits for a running call; a second time does nothing."""
        for half in self._target.originals:
            self.release(half)

    def release(self, half: str) -> None:
        """Give the VAE its own encode or decode back, as `restore` does with both."""
        if (stream := self._stream()) and not stream.is_here():
            stream.end(InputError("the VAE was restored while its stream was open: what came before is not all of it"))
        with self._lock:
            if half not in self._halves:
                return
            self._halves.remove(half)
            self._target.restore(half)
            self._dtypes.undo(half, self._halves)
            if not self._halves:
                for session in list(self._sessions):
                    session.close()
                self._free()
                self._kept = Kept()
                self._comm.close()

    def _disown(self) -> None:
        """In a forked child: a thread that is not there may have been in a call."""
        self._lock, self._running, self._stream = threading.RLock(), False, _no_stream

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __reduce__(self) -> Any:
        raise InputError(
            "a handle can't be copied or saved: it belongs to this process and its group; copy or save the VAE, "
            "whose copy has its own encode and decode, and call parallelize on that"
        )

    def __str__(self) -> str:
        options, plain = self._options, vars(Options())
        halves = [half for half in self._target.originals if half in self._halves]
        ranks, rare = self._comm.size, [f"{name} {getattr(options, name)}" for name in plain]
        reference = "un-tiled" if self._mode == "exact" else "tiles" if self._mode == "tile" else "as chosen"
        rows = {
            "halves": ", ".join(halves) or "none: restored",
            "ranks": f"{options.size or ranks} of {ranks} at work; this is rank {self._comm.rank}",
            "mode": f"{self._mode}, reference: {reference}",
            "axis": "x".join(map(str, options.axis)) if isinstance(options.axis, tuple) else options.axis,
            "gather": ", ".join(f"{half} {gather_of(options.gather, half)}" for half in halves),
            "dtype": str(self._dtypes) or "of the weights",
            "verify": "on" if options.verify else "off",
            "options": ", ".join(rare),
            "last": str(self.last or "no call yet").replace(": ", f"\n{11 * ' '}", 1),
        }
        if self._mode == "tile":
            del rows["axis"], rows["verify"]
        lines = (f"  {name:<9}{words}" for name, words in rows.items())
        return "\n".join([f"halovae: {self._target.name}", *lines])

    __repr__ = __str__

    def each(self, half: Half, *args: Any, **kwargs: Any) -> Any:
        """Run a half on another input on each rank: N pictures or clips on N ranks. Called on every rank of the group.

        A rank runs its own input alone, with the kernels of `optimize` and without a message. An input that does not
        fit into the memory of its rank is run by all ranks together, as a call of the half is, after the others.
        `last` tells how this rank's own was run: on one shard, or on several.

        Args:
            half: "encode" or "decode".
            args: as for the half itself. Shapes and values may differ between ranks.
            kwargs: likewise.

        Returns:
            What the half gives for this rank's input, whole, on this rank alone.

        Raises:
            InputError: this handle does not run the half, or the input can't be used.
            RankFailedError: another rank failed.

        Example:
            >>> handle = halovae.parallelize(vae)
            >>> video = handle.each("decode", latents_of_this_rank).sample
        """
        self._check_no_stream()
        with self._lock:
            if half not in self._halves:
                running = [name for name in self._target.originals if name in self._halves]
                raise InputError(f"half is {half!r}: this handle runs {' and '.join(running) or 'none any more'}")
            if self._running:  # By a hook, in a call.
                return self._target.originals[half](*args, **kwargs)
            self._running, started = True, time.perf_counter()
            try:
                with self._one_call(half, args, kwargs):
                    args, kwargs = self._dtypes.given(half, args, kwargs)
                    picture = self._agree_on_call(half, args, kwargs, alike=False)
                    with torch.no_grad(), self._reported(half, picture.device, started, started) as report:
                        with self._explained(half, args, kwargs):
                            ran = self._run_alone(half, picture, args, kwargs)
                        for rank, is_left in enumerate(self._comm.all_gather_object(ran is None)):
                            if is_left:
                                ran = self._run_for(rank, half, picture, args, kwargs) or ran
                        return report(cast("Ran", ran))
            finally:
                self._running = False

    def encode_stream(self, frames: Tensor | Iterable[Tensor], *, count: int | None = None, **kwargs: Any) -> Parts:
        """Encode a video that comes from an iterator. Called on every rank.

        Latents come as soon as they are final, and no rank holds all frames. Joined in time, the pieces are what one
        call gives, bit for bit. A VAE that walks through time in steps gives a piece after each of them, or after as
        many as go in one call of its network (`Options.frames_per_call`). Any other one gives one piece, for which all
        frames are held: `last.pieces` tells.

        Every rank reads its own iterator, and all have to yield the same clip. Whether they do is checked at each step,
        by sizes and some values. Nothing is read ahead of the step that is asked for.

        Args:
            frames: yields tensors `(batch, channels, frames, height, width)`, of any number of frames each; or one
                such tensor, of all frames.
            count: of all frames. Some VAEs cut a clip by it, and give one piece where it is not known.
            kwargs: as for `encode`.

        Returns:
            An iterator. It yields what the VAE's `encode` returns, for the frames of a step: a distribution where that
            gives one. On ranks that `gather` does not name, it yields what these get of a call.

        Raises:
            InputError: frames are of another size than the ones before, there are none, or not as many as `count` says;
                from the iterator, on the rank where it is so.
            DisagreementError: ranks read different clips; from the iterator, on all ranks.
            RankFailedError: another rank failed, or its iterator did; likewise.

        Example:
            >>> with handle.encode_stream(clip) as stream:
            ...     for piece in stream:
            ...         send(piece.latent_dist.mode())
        """
        return self._parts("encode", frames, count, kwargs)

    def session(self) -> ClipSession:
        """Open a clip that goes on from call to call. Called on every rank, in the same order.

        Raises:
            InputError: `Options.sessions` of them are open.

        Example:
            >>> with handle.session() as session:
            ...     while playing:
            ...         show(session.decode(next_latents()).sample)
        """
        most = self._options.sessions
        if len(self._sessions) >= most:
            gc.collect()  # Those that nobody holds any more are gone then.
        if len(self._sessions) >= most:
            raise InputError(f"{most} sessions are open, as many as allowed: close one, or give Options(sessions=...)")
        self._opened += 1
        session = ClipSession(self, f"session {self._opened}", self._sessions.discard)
        self._sessions.add(session)
        return session

    def _parts(self, half: Half, frames: Tensor | Iterable[Tensor], count: int | None, kwargs: dict[str, Any]) -> Parts:
        if isinstance(frames, Tensor):
            frames = [frames]
        if not isinstance(frames, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"{half}_stream got a {type(frames).__name__}: give an iterable of tensors")
        if count is not None and (type(count) is not int or count < 1):
            raise InputError(f"count is {count!r}: give the number of all frames, or None where it is not known")
        self._opened += 1
        words = f"{half} of stream {self._opened}"
        return Parts(self, half, frames, PartialClip(half, kwargs, words, self._next_start(), count))

    def _next_start(self) -> Start:
        """Of a new stream: how many there are since the last call, which ranks have agreed on."""
        calls, count = self._start
        self._start = self._calls, count + 1 if calls == self._calls else 0
        return self._start

    def forgo(self, start: Start, leaving: Leaving) -> None:
        """See `Runs`."""
        self._comm.forgo(start, leaving)

    def run_part(
        self, clip: PartialClip, frames: Tensor | None, *, ends: bool = False, goes_on: bool = True,
        problem: BaseException | None = None,
    ) -> Any:  # fmt: skip
        """See `Runs`."""
        self._check_no_stream()
        half, args = clip.half, tuple(tensor for tensor in (frames,) if tensor is not None)
        with self._lock:
            if half not in self._halves:
                if not goes_on:
                    return CLOSED
                raise InputError(f"this handle does not run {half} any more")
            if self._running:
                raise InputError(f"{clip.words} can't go on within a call of its handle")
            self._running, started = True, time.perf_counter()
            try:
                with self._one_call(half, args, clip.kwargs, clip.start):
                    if not all(self._comm.all_gather_object(goes_on)):
                        return CLOSED

                    def check() -> None:
                        if problem:
                            raise problem
                        clip.check(frames, ends)

                    args, kwargs = self._dtypes.given(half, args, clip.kwargs)
                    given = args or tuple(filter(torch.is_tensor, (clip.tail,)))
                    how = f", {clip.words}, {len(args)}{', its end' if ends else ''}"
                    picture = self._agree_on_call(half, given, kwargs, how=how, check=check)
                    with self._explained(half, given, kwargs):
                        if not clip.is_opened:
                            return self._open(clip, picture, kwargs)
                        with torch.no_grad(), self._reported(half, picture.device, started, started) as report:
                            result, went_on = self._next_part(clip, args, kwargs, ends, report)
                went_on()  # On all ranks.
                return result
            except Forgone as gone:
                clip.start = None
                if problem:
                    raise problem from None
                self._tell_who_left({gone.rank: gone.why}, 0)
                return CLOSED
            except Exception as error:
                if is_shortage(error):
                    self._free()  # The next try may have what recordings keep.
                raise
            finally:
                self._running = False

    def _open(self, clip: PartialClip, picture: Tensor, kwargs: dict[str, Any]) -> None:
        with together(self._comm) as said:
            stages = short = None
            try:
                stages = self._engine.stages(clip.half, picture[:, :, :1], kwargs)
                short = stages.short(clip.count)
                if not clip.is_session:  # Its steps are those that the caller makes.
                    stages.check(short)
            except InputError:
                raise
            except Exception as error:  # Whatever a model's code raises on frames that are not there.
                LOG.debug("%s of %s takes whole clips: %s", clip.half, self._target.name, error)
                if clip.is_session:
                    raise InputError(
                        f"{clip.words}: {self._target.name} can't go on from call to call: {error}"
                    ) from error
                stages = None
            said["steps in time"] = stages is not None
        clip.opened(stages, short)

    def _next_part(
        self, clip: PartialClip, args: tuple[Any, ...], kwargs: dict[str, Any], ends: bool, report: Callable[[Ran], Any]
    ) -> tuple[Any, Callable[[], None]]:  # fmt: skip
        """What the half gives for the frames that are final now, and what notes that all ranks have it."""
        stages, frames = clip.stages, args[0] if args else None
        if stages is None:
            result = report(self._engine.run(clip.half, args[0], args, kwargs)) if args else None
            return result, lambda: self._note_piece(clip, result)
        with together(self._comm):
            count = 0 if frames is None else frames.shape[2]
            found = None if ends else stages.next_part(clip.place, clip.short)
            stage, place = found[1:] if found else stages.rest_of(clip.place, count)
            laid_out = clip.laid_out(stage, frames) if stage.run or stage.length else None
        if laid_out is None:
            return None, lambda: clip.went_on(stage, place, clip.held, frames)
        clip.held.is_used_up = not clip.is_session  # A stream that fails has ended.
        ran, held = self._engine.run_stage(clip.half, (laid_out,), kwargs, stages, stage, clip.held)
        result = report(ran) if stage.length else None

        def went_on() -> None:
            clip.went_on(stage, place, held, frames)
            self._note_piece(clip, result)

        return result, went_on

    def _note_piece(self, clip: PartialClip, result: Any) -> None:
        if result is not None and self.last:
            clip.pieces.append(time.perf_counter() - clip.started)
            self.last = replace(self.last, pieces=len(clip.pieces), first_seconds=clip.pieces[0])

    def decode_stream(self, *args: Any, count: int | None = None, **kwargs: Any) -> Stream | Parts:
        """Decode a video and get its frames as they come. Called on every rank, as `decode`, with equal arguments.

        Latents that come from an iterator themselves are read as `encode_stream` reads frames.

        The pieces, joined in time, are what one call gives, bit for bit. They come after each step in time of a VAE
        that walks through time in steps, in tiles after those of all tiles; any other one gives one piece:
        `last.pieces` tells. No rank holds the whole output unless the caller keeps it. One piece is computed ahead of
        the reader.

        Every rank goes through its own stream. Before each piece all ranks agree to go on: where one has closed its
        stream (by leaving the loop, too, and also before it has asked for the first piece), the streams of all end
        there, and the handle can be used again. Until its end the handle makes no other call.

        Args:
            args: as for `decode`; in place of the latents, an iterable of latents of any number of frames each.
            count: of all latent frames, as for `encode_stream`, where they come from an iterable.
            kwargs: likewise.

        Returns:
            An iterator over frames `(batch, channels, frames, height, width)`, on the ranks that `gather` names; the
            others get what they get of a call.

        Raises:
            InputError: this handle does not run decode, or is in another call; from the iterator.
            RankFailedError: another rank failed; likewise.

        Example:
            >>> with handle.decode_stream(latents) as stream:
            ...     for frames in stream:
            ...         show(frames)
        """
        if len(args) == 1 and isinstance(args[0], Iterable) and not isinstance(args[0], Tensor):
            return self._parts("decode", cast("Iterable[Tensor]", args[0]), count, kwargs)
        device = next((picture.device for picture in pictures_in((args, kwargs))), torch.device("cpu"))
        self._check_no_stream()
        with self._lock:
            if self._running:
                raise InputError("a stream can't begin within a call of its handle")

        start = self._next_start()

        def work(give: Give) -> None:
            self._run_stream("decode", args, kwargs, start, stream, give)

        made = Stream(work, device, functools.partial(self.forgo, start))
        stream = weakref.ref(made)  # One that nobody reads any more ends.
        return made

    def _run_stream(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], start: Start,
        stream: Callable[[], Stream | None], give: Give,
    ) -> None:  # fmt: skip
        pieces, said, started = list[float](), dict[int, Leaving](), time.perf_counter()
        shared = 0

        def emit(frames: Tensor) -> None:
            nonlocal shared
            pieces.append(time.perf_counter() - started)
            leaving = give(frames)
            del frames
            everyone = self._comm.all_gather_object(leaving)
            shared += 1
            said.update((rank, each) for rank, each in enumerate(everyone) if each)
            if said:
                raise StreamClosed

        def attempt() -> bool:
            try:
                self._attempt(half, args, kwargs, started, emit, pieces, start)
            except Forgone as gone:
                said[gone.rank] = gone.why
            except BaseException as error:
                # An exchange that has ended on one rank has ended on all. Pieces are not as many on each of them.
                if shared or not self._goes_again(half, args, kwargs, error, is_out=bool(pieces)):
                    raise
                return False
            return True

        try:
            self._check_no_stream()
            with self._lock:
                if half not in self._halves:
                    raise InputError(f"this handle does not run {half} any more")
                self._running, self._stream = True, stream
                try:
                    while not attempt():
                        gc.collect()
                finally:
                    self._running, self._stream = False, _no_stream
        except BaseException as error:
            if not shared:
                self.forgo(start, Leaving.by(error))
            raise
        if self._comm.rank not in said:
            self._tell_who_left(said, len(pieces))

    def _tell_who_left(self, said: Mapping[int, Leaving], pieces: int) -> None:
        """On a rank that would have gone on."""
        for rank, leaving in said.items():
            if leaving.failure:
                raise failed_elsewhere(rank, *leaving.failure)
        for rank, leaving in said.items():
            if not leaving.is_closed:
                LOG.warning(
                    "rank %d has left its stream without closing it: the streams of all ranks end after %d pieces",
                    rank, pieces,
                )  # fmt: skip

    def _check_no_stream(self) -> None:
        stream = self._stream()
        if stream and stream.is_open and not stream.is_here():
            raise InputError("a stream of this handle is open: take all its frames or close it before the next call")

    def _run_alone(self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ran | None:
        """This rank's own input, on this rank; None where its memory is too small for that."""
        if self._solo is None:
            self._solo = self._make_engine(SoloComm(), size=None, axis="auto", gather="all")
        undone = rewound_by_failure(picture.device, *args, *kwargs.values())
        try:
            with undone_by_failure(self._target.facts, args, kwargs), undone:
                return self._solo.run(half, picture, args, kwargs)
        except Exception as error:
            if not is_shortage(error):
                raise
        self._free()
        gc.collect()  # What the attempt held: its frames are in a cycle with its exception.
        return None

    def _run_for(
        self, rank: int, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Ran | None:
        """The input of one rank, on all ranks; the result on that rank, elsewhere None."""
        if self._whole is None:
            self._whole = self._make_engine(gather="all", alone=False)
        args, kwargs = _from_rank(self._comm, rank, (args, kwargs), picture.device)
        ran = self._whole.run(half, pictures_in((args, kwargs))[0], args, kwargs)
        return ran if rank == self._comm.rank else None

    def _call(self, half: str, *args: Any, **kwargs: Any) -> Any:
        self._check_no_stream()
        with self._lock:
            # A half that calls a half is in shards already; who kept the method beyond `restore` gets the VAE's own.
            if self._running or half not in self._halves:
                return self._target.originals[half](*args, **kwargs)
            self._running, started = True, time.perf_counter()
            try:
                while True:
                    try:
                        return self._attempt(half, args, kwargs, started)
                    except BaseException as error:
                        if not self._goes_again(half, args, kwargs, error):
                            raise
                    gc.collect()  # What the attempt held: its frames are in a cycle with its exception.
            finally:
                self._running = False

    def _goes_again(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException, is_out: bool = False
    ) -> bool:  # fmt: skip
        """See `Engine.retreat`."""
        return self._engine.retreat(half, lambda: self._dtypes.given(half, args, kwargs), error, is_out)


def _no_stream() -> None:
    return None


def _from_rank(comm: Comm, source: int, value: T, device: torch.device) -> T:
    """What one rank has, on every rank; a copy on the others, with tensors on the device."""
    skeleton = comm.all_gather_object(on_meta(value) if comm.rank == source else None)[source]
    if comm.rank == source:
        tensors = [tensor.contiguous() for tensor in tensors_in(value)]
        comm.exchange([(peer, t) for peer in range(comm.size) if peer != source for t in tensors], [])
        return value
    filled = map_tensors(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), skeleton)
    comm.exchange([], [(source, tensor) for tensor in tensors_in(filled)])
    return filled
